"""What waits to be tokenized or decoded: bounded, within its deadline, and only for who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.edge import calls
from server.edge.encoders import Encoders, EncodersFull
from server.edge.middleware import Exchange
from server.edge.service import LONG_CHARACTERS
from server.errors import Refusal


@contextmanager
def made() -> Iterator[Encoders]:
    encoders = Encoders()
    try:
        yield encoders
    finally:
        encoders.close()


def soon() -> float:
    return time.monotonic() + 30


async def begun(encoders: Encoders, gate: threading.Event) -> asyncio.Task[bool]:
    """Occupy the thread until ``gate`` is set."""
    at_work = threading.Event()

    def work() -> bool:
        at_work.set()
        return gate.wait(30)

    task = asyncio.create_task(encoders.run(work, deadline=soon(), most=9))
    while not at_work.is_set():
        await asyncio.sleep(0.001)
    return task


def test_no_more_wait_than_may_and_all_run_in_order() -> None:
    async def scenario() -> list[int]:
        order: list[int] = []
        gate = threading.Event()
        with made() as encoders:
            first = await begun(encoders, gate)
            others = [
                asyncio.create_task(
                    encoders.run(lambda i=i: order.append(i), deadline=soon(), most=4)  # type: ignore[misc]
                )
                for i in range(3)
            ]
            await asyncio.sleep(0)
            with pytest.raises(EncodersFull, match="4 requests"):
                await encoders.run(lambda: order.append(9), deadline=soon(), most=4)
            gate.set()
            await asyncio.gather(first, *others)
            assert encoders.waiting == 0
        return order

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_work_whose_deadline_passed_or_whose_client_left_is_never_begun() -> None:
    async def scenario() -> list[str]:
        ran: list[str] = []
        gate = threading.Event()
        with made() as encoders:
            first = await begun(encoders, gate)
            with pytest.raises(TimeoutError):
                await encoders.run(
                    lambda: ran.append("late"), deadline=time.monotonic() + 0.05, most=9
                )
            gone = asyncio.create_task(
                encoders.run(lambda: ran.append("gone"), deadline=soon(), most=9)
            )
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.wait([gone])
            assert encoders.waiting == 1
            gate.set()
            assert await first
            await encoders.run(lambda: ran.append("there"), deadline=soon(), most=9)
            with pytest.raises(TimeoutError):
                await encoders.run(
                    lambda: ran.append("over"), deadline=time.monotonic() - 1, most=9
                )
        return ran

    assert asyncio.run(scenario()) == ["there"]


def test_given_up_work_keeps_the_thread_until_it_ends() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with made() as encoders:
            first = await begun(encoders, gate)
            first.cancel()
            await asyncio.wait([first])
            with pytest.raises(TimeoutError):
                await encoders.run(lambda: None, deadline=time.monotonic() + 0.05, most=1)
            gate.set()
            assert await encoders.run(lambda: 5, deadline=soon(), most=1) == 5

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [True, False])
def test_call_whose_client_leaves_stops_waiting_for_the_encoders(leaves: bool) -> None:
    class Call:
        def __init__(self) -> None:
            self.scope = {"hira": Exchange("id", time.monotonic())}
            self.headers: dict[str, str] = {}

        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.02 if leaves else 30)
            return {"type": "http.disconnect"}

    class Served:
        cancelled = False

        def deadline(self, began: float, asked: str | None) -> float:
            return began + 30

        async def tokenize(self, characters: int, work: Any, field: str, deadline: float) -> Any:
            assert field == "inputs"
            try:
                await asyncio.sleep(30 if leaves else 0.02)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            return work()

    async def scenario() -> None:
        call: Any = Call()
        served: Any = Served()
        if leaves:
            with pytest.raises(Refusal, match="cancelled"):
                await calls.tokenize(call, served, LONG_CHARACTERS + 1, lambda: 7)
            await asyncio.sleep(0)
        else:
            assert await calls.tokenize(call, served, LONG_CHARACTERS + 1, lambda: 7) == 7
        assert served.cancelled is leaves

    asyncio.run(scenario())
