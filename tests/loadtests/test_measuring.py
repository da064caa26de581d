"""What the load tests measure with: trends, pass marks, the cheap client, the casting of users.

A measure that never fails anything is worth nothing, so each is shown what it must find.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.busy import busy_processes
from loadtests.connection import Connection, Lost, encoded
from loadtests.openloop import Pool, Question, offer
from loadtests.scenarios import SCENARIOS, Mark, Stage
from loadtests.traffic import last_event, percentile
from loadtests.watch import trend
from tests.stand.waits import until

MIB = float(1 << 20)


def walk(minutes: float, per_minute: float, seed: int, noise: float = 0.5) -> list[float]:
    """Resident memory every two seconds: steps that stay for a while, on a slope."""
    rng = random.Random(seed)
    value, found = 0.0, []
    for index in range(int(minutes * 30)):
        value = 0.9 * value + rng.gauss(0.0, noise * MIB)
        found.append(300 * MIB + value + per_minute * MIB * index / 30)
    return found


def test_trend_finds_a_leak_and_lets_noise_pass() -> None:
    at = [2.0 * index for index in range(30 * 20)]
    passed = sum(trend(at, walk(20, 0.0, seed)).is_noise for seed in range(40))
    assert passed >= 36, "a process that does not grow is called a leak"
    found = sum(not trend(at, walk(20, 1.0, seed)).is_noise for seed in range(40))
    assert found == 40, "a MiB a minute goes unseen"


def test_trend_of_a_straight_line_is_its_slope() -> None:
    line = trend([0.0, 60.0, 120.0, 180.0], [1.0, 3.0, 5.0, 7.0])
    assert (line.per_minute, line.first, line.last) == pytest.approx((2.0, 1.0, 7.0))
    assert not line.is_noise
    with pytest.raises(ValueError, match="2 samples"):
        trend([0.0, 1.0], [1.0, 1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_is_one_of_the_values(values: list[float], part: float) -> None:
    assert percentile(values, part) in values


def test_marks_fail_on_either_side_and_on_nothing() -> None:
    mark = Mark("x", lambda report: float(report["x"]), at_least=1.0, at_most=2.0)
    assert [mark.holds({"x": value}) for value in (0.9, 1.0, 2.0, 2.1, math.nan)] == [
        *(False, True, True, False, False)
    ]


@pytest.mark.parametrize("name", SCENARIOS)
def test_stages_fill_the_time_and_marks_name_what_is_there(name: str) -> None:
    scenario = SCENARIOS[name]
    assert sum(stage.part for stage in scenario.stages) == pytest.approx(1.0)
    assert scenario.users_at(0.0) == (scenario.stages[0].name, scenario.stages[0].users)
    assert scenario.users_at(1.001) is None
    assert len({mark.what for mark in scenario.marks}) == len(scenario.marks)
    empty = {"stages": {}, "memory_ratio": math.nan, "descriptor_ratio": math.nan}
    zero = dict.fromkeys(("wrong", "errors", "good", "refused", "trickled", "turned_over"), 0)
    report = {**empty, **zero, "adapters": 0}
    assert not all(mark.holds(report) for mark in scenario.marks), "a run of nothing passes"


def test_a_stage_is_what_its_time_says() -> None:
    stages = SCENARIOS["spike"].stages
    ends = list(itertools.accumulate(stage.part for stage in stages))
    for stage, end in zip(stages, ends, strict=True):
        found = SCENARIOS["spike"].users_at(end - 1e-6)
        assert found == (stage.name, stage.users)
    assert isinstance(stages[0], Stage)


def test_last_event_of_a_stream() -> None:
    assert last_event(b'data: {"a": 1}\n\ndata: {"a": 2}\n\n') == {"a": 2}
    assert last_event(b"") == last_event(b"data: {") == last_event(b"data: [1]\n") == {}


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def serving(handler: Handler) -> tuple[asyncio.Server, int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    return server, int(server.sockets[0].getsockname()[1])


def test_client_reads_whole_answers_and_tells_of_half_ones() -> None:
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head + await reader.readexactly(9))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Y: z\r\n\r\n")
        writer.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 503 No\r\nContent-Length: 14\r\n\r\n{"code":"gone"}'[:-1])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    async def play() -> None:
        server, port = await serving(answer)
        connection = await Connection.open(port)
        pieces: list[bytes] = []
        whole = await connection.ask(encoded("/x", {"a": "b"}), pieces.append)
        assert (whole.status, whole.body, whole.header("X-y")) == (200, b"abcde", "z")
        assert b"".join(pieces) == b"abcde"
        refused = await connection.ask(encoded("/y", method="GET"))
        assert refused.code() == "503"  # its body is cut: no code can be read
        with pytest.raises(Lost):
            await connection.ask(encoded("/z", method="GET"))
        assert not connection.usable
        server.close()

    asyncio.run(play())
    assert asked[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert b'{"a": "b"' in asked[0]


def test_open_loop_keeps_its_rate_when_nobody_answers_in_time() -> None:
    left: list[int] = []  # connections that ended

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, OSError):
                break
            await asyncio.sleep(0.4)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()
        left.append(1)

    async def play() -> None:
        server, port = await serving(slow)
        pool = Pool(port, most=20)
        question = Question(encoded("/", method="GET"), lambda reply: None)
        outcome = await offer(pool, lambda: question, 100.0, 1.0, seed=3)
        pool.close()
        server.close()
        while len(left) < pool.most:
            await asyncio.sleep(0.01)
        assert outcome.without_connection > 0  # 20 connections carry 50 a second
        assert 20 <= outcome.sent < outcome.due
        assert outcome.good + outcome.late == outcome.sent
        assert outcome.late > 0
        assert min(outcome.latencies) > 0.39

    asyncio.run(play())


def test_a_busy_process_takes_the_part_of_a_core_that_it_is_told() -> None:
    before = {one.pid for one in psutil.Process().children()}
    with busy_processes(1, 0.3, niceness=1):
        (busy,) = [one for one in psutil.Process().children() if one.pid not in before]
        until(lambda: busy.cpu_times().user > 0.2)
        spent, began = sum(busy.cpu_times()[:2]), time.monotonic()
        until(lambda: sum(busy.cpu_times()[:2]) - spent > 0.3)
        # Other work keeps it from its part, and it takes that later; so only this side is certain.
        assert (sum(busy.cpu_times()[:2]) - spent) / (time.monotonic() - began) < 1.0
        assert busy.nice() == min(19, psutil.Process().nice() + 1)
    assert not busy.is_running()
