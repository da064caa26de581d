"""A wall clock that a test can move under a running server, in all of its processes at once.

Nobody may move the machine's own: here ``time.time`` adds what a file in the data folder says.
"""

from __future__ import annotations

import time
from pathlib import Path

_real = time.time


def install(folder: Path) -> None:
    """Make this process, and what it forks, read the clock so."""
    offset = folder / "clock-offset"

    def shifted() -> float:
        try:
            return _real() + float(offset.read_text())
        except (OSError, ValueError):
            return _real()

    time.time = shifted


def shift(folder: Path, seconds: float) -> None:
    """Move the clock of the server whose data are in ``folder``, from its true time."""
    fresh = folder / "clock-offset.new"
    fresh.write_text(str(seconds))
    fresh.replace(folder / "clock-offset")
