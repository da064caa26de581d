"""Shows how a start goes on: bars on a terminal, a line for each stage elsewhere.

Nothing here makes a thread: processes are forked while it shows.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from server.stages import Stage

if TYPE_CHECKING:
    from rich.progress import Progress


class StartProgress:
    """A listener of stages; to be ended before anything else is printed for good.

    Args:
        terminal: Whether to draw bars; None: when standard output is a terminal.
    """

    def __init__(self, terminal: bool | None = None) -> None:
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._bars: Progress | None = None
        self._task: Any = None
        self._name: str | None = None
        self._began = 0.0

    def show(self, stage: Stage) -> None:
        """A stage begins, or goes on."""
        if stage.name != self._name:
            self._finish()
            self._name, self._began = stage.name, time.monotonic()
            if self._terminal:
                self._begin_bar(stage)
            else:
                of = f" ({stage.total})" if stage.total else ""
                print(f"  {stage.name}{of} ...", flush=True)
        if self._bars is not None:
            self._bars.update(self._task, completed=stage.done, total=stage.total or None)
            self._bars.refresh()

    def end(self) -> None:
        """No more stages: the last one is done."""
        self._finish()
        self._name = None

    def give_up(self) -> None:
        """The start failed: the bar goes, and nothing says that its stage was done."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._name = None

    def _begin_bar(self, stage: Stage) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import SpinnerColumn, TimeElapsedColumn  # isort: skip

        counted = (BarColumn(bar_width=30), MofNCompleteColumn()) if stage.total else ()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *counted,
            TimeElapsedColumn(),
            console=Console(),
            auto_refresh=False,  # by a thread
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bars.add_task(stage.name, total=stage.total or None)
        self._bars.start()

    def _finish(self) -> None:
        if self._name is None:
            return
        seconds = time.monotonic() - self._began
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            print(f"  {self._name:36} {seconds:6.1f} s", flush=True)
