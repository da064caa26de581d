"""What waits to be tokenized or decoded: bounded, within its deadline, and only for who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.edge.admit.bounded_pool import BoundedPool, PoolFull, PoolHung, PoolLate
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.edge.admit.slow_work import (
    AT_ONCE_CHARACTERS,
    LONG_CHARACTERS,
    POOLS,
    UNHURRIED,
    UNHURRIED_WAITING,
    SlowWork,
)
from server.edge.endpoints import answers as calls
from server.edge.endpoints.middleware import RequestContext
from server.edge.link.dispatcher import Dispatcher
from server.errors import Refusal
from server.settings import Settings


@contextmanager
def made(threads: int = 1, hang_s: float = 60.0) -> Iterator[tuple[BoundedPool, list[str]]]:
    """A pool, and where it tells of work that hangs."""
    told: list[str] = []
    pool = BoundedPool("tried", threads, hang_s=hang_s, hung=told.append)
    try:
        yield pool, told
    finally:
        pool.close()


def soon() -> float:
    return time.monotonic() + 30


async def begun(pool: BoundedPool, gate: threading.Event) -> asyncio.Task[bool]:
    """Occupy the thread until ``gate`` is set."""
    at_work = threading.Event()

    def work() -> bool:
        at_work.set()
        return gate.wait(30)

    task = asyncio.create_task(pool.run(work, deadline=soon(), most=9))
    while not at_work.is_set():
        await asyncio.sleep(0.001)
    return task


def test_no_more_wait_than_may_and_all_run_in_order() -> None:
    async def scenario() -> list[int]:
        order: list[int] = []
        gate = threading.Event()
        with made() as (pool, _):
            first = await begun(pool, gate)
            others = [
                asyncio.create_task(
                    pool.run(lambda i=i: order.append(i), deadline=soon(), most=4)  # type: ignore[misc]
                )
                for i in range(3)
            ]
            await asyncio.sleep(0)
            with pytest.raises(PoolFull, match="4 requests"):
                await pool.run(lambda: order.append(9), deadline=soon(), most=4)
            gate.set()
            await asyncio.gather(first, *others)
            assert pool.waiting == 0
        return order

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_work_whose_deadline_passed_or_whose_client_left_is_never_begun() -> None:
    async def scenario() -> list[str]:
        ran: list[str] = []
        gate = threading.Event()
        with made() as (pool, _):
            first = await begun(pool, gate)
            with pytest.raises(PoolLate):
                await pool.run(lambda: ran.append("late"), deadline=time.monotonic() + 0.05, most=9)
            gone = asyncio.create_task(
                pool.run(lambda: ran.append("gone"), deadline=soon(), most=9)
            )
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.wait([gone])
            assert pool.waiting == 1
            gate.set()
            assert await first
            await pool.run(lambda: ran.append("there"), deadline=soon(), most=9)
            with pytest.raises(PoolLate):
                await pool.run(lambda: ran.append("over"), deadline=time.monotonic() - 1, most=9)
        return ran

    assert asyncio.run(scenario()) == ["there"]


def test_given_up_work_keeps_the_thread_until_it_ends() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with made() as (pool, _):
            first = await begun(pool, gate)
            first.cancel()
            await asyncio.wait([first])
            with pytest.raises(PoolLate):
                await pool.run(lambda: None, deadline=time.monotonic() + 0.05, most=1)
            gate.set()
            assert await pool.run(lambda: 5, deadline=soon(), most=1) == 5

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

        @property
        def slow_work(self) -> Any:
            return self

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
def service(**changes: Any) -> Iterator[Any]:
    """Slow work and its bounds alone, and a dispatcher that ends nothing."""
    settings = Settings().model_copy(update=changes)
    served: Any = SimpleNamespace(ended=[])
    served.dispatcher = Dispatcher(SharedLoad(1), Bounds(9, 9, 9), 1, Path("none"))
    served.dispatcher.end = lambda: served.ended.append(True)
    served.slow_work = SlowWork(settings, served.dispatcher.admission, served.dispatcher.give_up)
    served.slow_work.open()
    try:
        yield served
    finally:
        served.slow_work.close()


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
                served.slow_work.tokenize(encoder, LONG_CHARACTERS + 1, long, "inputs", soon())
            )
            await until(at_work)
            at_once = await served.slow_work.tokenize(encoder, 10, brief, "inputs", soon())
            assert at_once == (encoder, threading.current_thread())
            given, thread = await served.slow_work.tokenize(
                encoder, LONG_CHARACTERS, brief, "inputs", soon()
            )
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
                served.slow_work.tokenize(
                    Encoder(), AT_ONCE_CHARACTERS + 1, middling, "inputs", soon()
                )
            )
            await until(at_work)
            second = asyncio.create_task(
                served.slow_work.tokenize(
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
                asyncio.create_task(served.slow_work.run(lambda: gate.wait(30), full))
                for _ in range(POOLS[full] + 4)
            ]
            await asyncio.sleep(0.01)
            for other in POOLS:
                if other != full:
                    assert await served.slow_work.run(lambda: 7, other) == 7
            gate.set()
            await asyncio.gather(*waiting)

    asyncio.run(scenario())


@pytest.mark.parametrize("pool", POOLS)
def test_every_kind_of_slow_work_is_bounded_in_number_but_for_what_is_owed(pool: Any) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        most = UNHURRIED_WAITING if pool in UNHURRIED else UNHURRIED_WAITING + 6
        with service(max_queue_requests=UNHURRIED_WAITING + 6, api_processes=1) as served:
            waiting = [
                asyncio.create_task(served.slow_work.run(lambda: gate.wait(30), pool))
                for _ in range(most)
            ]
            await asyncio.sleep(0.01)
            with pytest.raises(Refusal) as caught:
                await served.slow_work.run(lambda: 7, pool)
            assert caught.value.faults[0].code == "overloaded"
            assert int(caught.value.headers["Retry-After"]) >= 1
            owed = asyncio.create_task(served.slow_work.run(lambda: 8, pool, owed=True))
            await asyncio.sleep(0.01)
            gate.set()
            assert await owed == 8
            await asyncio.gather(*waiting)
            assert await served.slow_work.run(lambda: 7, pool) == 7

    asyncio.run(scenario())


def test_what_waits_is_bounded_in_bytes_but_one_alone_may_have_more() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with service(max_pending_body_bytes=1000) as served:
            first = asyncio.create_task(
                served.slow_work.run(lambda: gate.wait(30), "bodies", size_bytes=5000)
            )
            await asyncio.sleep(0.01)
            with pytest.raises(Refusal) as caught:
                await served.slow_work.run(lambda: 7, "bodies", size_bytes=1)
            assert "5000 bytes" in (caught.value.faults[0].found or "")
            gate.set()
            await first
            assert await served.slow_work.run(lambda: 7, "bodies", size_bytes=999) == 7

    asyncio.run(scenario())


@pytest.mark.parametrize("threads", [1, 2])
def test_work_that_never_ends_is_told_of_and_so_is_who_waits_behind_it(threads: int) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with made(threads, hang_s=0.2) as (pool, told):
            hangs = [
                asyncio.create_task(pool.run(lambda: gate.wait(30), deadline=soon()))
                for _ in range(threads)
            ]
            behind = [asyncio.create_task(pool.run(lambda: True)) for _ in range(3)]
            found = await asyncio.gather(*hangs, *behind, return_exceptions=True)
            assert {type(one) for one in found} == {PoolHung}
            with pytest.raises(PoolHung):
                await pool.run(lambda: 7)
            assert told == ["tried"]
            assert not pool.idle
            gate.set()

    asyncio.run(scenario())


def test_who_left_does_not_hide_that_work_hangs() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with made(hang_s=0.3) as (pool, told):
            with pytest.raises(PoolLate):
                await pool.run(lambda: gate.wait(30), deadline=time.monotonic() + 0.05)
            assert told == []
            while not told:
                await asyncio.sleep(0.01)
            gate.set()

    asyncio.run(scenario())


def test_error_of_the_work_is_passed_on_even_where_it_is_a_timeout() -> None:
    def fails() -> None:
        raise TimeoutError("of a socket")

    async def scenario() -> None:
        with made() as (pool, _), pytest.raises(TimeoutError, match="of a socket"):
            await pool.run(fails, deadline=soon())

    asyncio.run(scenario())


def test_service_ends_its_process_for_work_that_hangs() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with service(hang_s=0.3) as served:
            with pytest.raises(Refusal) as caught:
                await served.slow_work.run(lambda: gate.wait(60), "metrics", deadline=soon())
            assert caught.value.faults[0].code == "restarting"
            assert served.ended == [True]
            assert served.dispatcher.status == "restarting"
            gate.set()

    asyncio.run(scenario())
