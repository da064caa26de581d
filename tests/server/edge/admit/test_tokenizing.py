"""What waits to be tokenized or decoded: bounded, within its deadline, and only for who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from server.edge.admit.tokenizing import TokenizersBusy, TokenizerThreads
from server.edge.endpoints import answers as calls
from server.edge.endpoints.middleware import RequestContext
from server.edge.service import AT_ONCE_CHARACTERS, LONG_CHARACTERS, POOLS, Service
from server.errors import Refusal
from server.settings import Settings


@contextmanager
def made() -> Iterator[TokenizerThreads]:
    encoders = TokenizerThreads()
    try:
        yield encoders
    finally:
        encoders.close()


def soon() -> float:
    return time.monotonic() + 30


async def begun(encoders: TokenizerThreads, gate: threading.Event) -> asyncio.Task[bool]:
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
            with pytest.raises(TokenizersBusy, match="4 requests"):
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
            self.scope = {"hira": RequestContext("id", time.monotonic())}
            self.headers: dict[str, str] = {}

        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.02 if leaves else 30)
            return {"type": "http.disconnect"}

    class Served:
        cancelled = False

        def deadline(self, began: float, asked: str | None) -> float:
            return began + 30

        async def tokenize(
            self, encoder: Any, characters: int, work: Any, field: str, deadline: float
        ) -> Any:
            assert field == "inputs"
            try:
                await asyncio.sleep(30 if leaves else 0.02)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            return work(encoder)

    async def scenario() -> None:
        call: Any = Call()
        served: Any = Served()
        seven: Any = 7
        if leaves:
            with pytest.raises(Refusal, match="cancelled"):
                await calls.tokenize(call, served, seven, AT_ONCE_CHARACTERS + 1, lambda n: n)
            await asyncio.sleep(0)
        else:
            assert (
                await calls.tokenize(call, served, seven, AT_ONCE_CHARACTERS + 1, lambda n: n) == 7
            )
        assert served.cancelled is leaves

    asyncio.run(scenario())


class Encoder:
    """Stands for a tokenizer; ``apart`` is another."""

    def __init__(self) -> None:
        self.apart: Any = object()


@contextmanager
def service() -> Iterator[Any]:
    """A service of threads and lanes alone."""
    served: Any = Service.__new__(Service)
    served.settings = Settings()
    served._short, served._long = TokenizerThreads(), TokenizerThreads("long-texts")
    served._reader = None
    served._pools = {name: ThreadPoolExecutor(count) for name, count in POOLS.items()}
    served.registry = Closed()
    try:
        yield served
    finally:
        served.close()


class Closed:
    def close(self) -> None:
        pass


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.001)


def test_long_text_at_work_holds_up_neither_the_loop_nor_short_and_middling_texts() -> None:
    async def scenario() -> None:
        encoder, gate, at_work = Encoder(), threading.Event(), threading.Event()

        def long(given: Any) -> Any:
            at_work.set()
            assert gate.wait(30)
            return given, threading.current_thread().name

        def brief(given: Any) -> Any:
            return given, threading.current_thread()

        with service() as served:
            running = asyncio.create_task(
                served.tokenize(encoder, LONG_CHARACTERS + 1, long, "inputs", soon())
            )
            await until(at_work)
            at_once = await served.tokenize(encoder, 10, brief, "inputs", soon())
            assert at_once == (encoder, threading.current_thread())
            given, thread = await served.tokenize(encoder, LONG_CHARACTERS, brief, "inputs", soon())
            assert given is encoder
            assert thread is not threading.current_thread()
            assert not running.done()
            gate.set()
            given, name = await running
            assert given is encoder.apart
            assert name.startswith("long-texts")

    asyncio.run(scenario())


def test_short_text_leaves_the_loop_while_a_thread_has_its_tokenizer() -> None:
    async def scenario() -> None:
        gate, at_work = threading.Event(), threading.Event()
        seen: list[threading.Thread] = []

        def middling(given: Any) -> None:
            at_work.set()
            assert gate.wait(30)

        with service() as served:
            first = asyncio.create_task(
                served.tokenize(Encoder(), AT_ONCE_CHARACTERS + 1, middling, "inputs", soon())
            )
            await until(at_work)
            second = asyncio.create_task(
                served.tokenize(
                    Encoder(),
                    1,
                    lambda _: seen.append(threading.current_thread()),
                    "inputs",
                    soon(),
                )
            )
            await asyncio.sleep(0.01)
            assert not seen
            gate.set()
            await asyncio.gather(first, second)
            assert seen
            assert seen[0] is not threading.current_thread()

    asyncio.run(scenario())


@pytest.mark.parametrize("full", POOLS)
def test_one_kind_of_slow_work_at_its_limit_stops_no_other(full: Any) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with service() as served:
            waiting = [
                asyncio.create_task(served.in_thread(lambda: gate.wait(30), full))
                for _ in range(POOLS[full] + 4)
            ]
            await asyncio.sleep(0.01)
            for other in POOLS:
                if other != full:
                    assert await served.in_thread(lambda: 7, other) == 7
            gate.set()
            await asyncio.gather(*waiting)

    asyncio.run(scenario())
