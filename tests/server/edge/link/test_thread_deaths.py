"""A thread or a task of ours that an error ends is told of; others are left to their makers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from server.edge.link.thread_deaths import watch_threads, watched


@pytest.fixture
def died() -> Iterator[list[str]]:
    """Names of the threads that died; hooks as they were, afterwards."""
    names: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda end: names.append("left to others")
    watch_threads(names.append)
    yield names
    threading.excepthook = before


def end(target: Any, name: str) -> None:
    thread = threading.Thread(target=target, name=name)
    thread.start()
    thread.join(10)


def test_death_of_a_thread_of_ours_is_told(
    died: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from adapters.residency.slots import Residency
    from server.edge.litserve.loop import LoopRun

    incomplete: Any = object()
    end(lambda: None, "ends well")
    end(LoopRun.read_requests.__get__(incomplete), "requests")
    end(Residency._run.__get__(incomplete), "adapter-loader")
    assert died == ["requests", "adapter-loader"]
    assert "AttributeError" in caplog.text, "with its traceback"


def test_threads_of_libraries_are_left_to_them(died: list[str]) -> None:
    end(queue.Queue.get.__get__(object()), "not ours")
    assert died == ["left to others"]


def test_death_of_a_task_is_told_and_its_end_is_not() -> None:
    died: list[str] = []

    async def breaks() -> None:
        raise OSError(5, "an error of the disk")

    async def run() -> None:
        ended = watched(asyncio.sleep(0), "ends", died.append)
        stopped = watched(asyncio.sleep(60), "stopped", died.append)
        broken = watched(breaks(), "breaks", died.append)
        stopped.cancel()
        await asyncio.wait((ended, stopped, broken))
        await asyncio.sleep(0)

    asyncio.run(run())
    assert died == ["breaks"]
