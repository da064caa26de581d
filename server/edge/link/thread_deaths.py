"""Threads and tasks that a process cannot do without: when one dies, its process ends and is told.

A process that lives on without its reader or its sender looks well and answers nobody. So a death
of one, of whatever error, ends the whole process, whose successor the main process starts. How it
ends is the caller's: the worker at once, an HTTP process in order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Final

logger = logging.getLogger(__name__)

OURS: Final = ("server", "adapters")  # packages whose threads are watched


def watch_threads(died: Callable[[str], None]) -> None:
    """From now on call ``died`` with the name of any thread of ours that an exception has ended.

    One place for all of them, so that none is forgotten: a thread is ours when our code is what it
    was made to run. Threads that libraries make for themselves are left to them, as are those of
    executors, which hand every exception to whoever waits.
    """
    before = threading.excepthook

    def on_end(end: threading.ExceptHookArgs) -> None:
        if not _is_ours(end.exc_traceback):
            before(end)
            return
        name = end.thread.name if end.thread is not None else "?"
        error = end.exc_value
        logger.error("The thread %s died", name, exc_info=error)
        died(name)

    threading.excepthook = on_end


def watched(
    work: Coroutine[object, object, None], name: str, died: Callable[[str], None]
) -> asyncio.Task[None]:
    """A task that runs ``work``; ``died`` is called with its name when an error ends it."""

    def on_end(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("The task %s died", name, exc_info=error)
        died(name)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(on_end)
    return task


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the outermost code below `threading` itself belongs to this project."""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module != threading.__name__:
            return module.partition(".")[0] in OURS
        trace = trace.tb_next
    return False
