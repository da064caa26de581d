"""The real server in its own processes, on the base and adapters of ``generation``.

Clients and server share the machine's cores, which the engine alone has for itself.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loadtests.bench.generation import (
    ADAPTERS,
    NEW_TOKENS,
    PROMPTS,
    Alone,
    built,
    generate_all,
    made,
)
from loadtests.bench.live import Connection, Server, running
from loadtests.bench.runs import raise_if_failed
from loadtests.bench.timing import THREADS, Budget, Figure, Report, percentile, ratio_of
from server.messages import TERMINAL, EncodeRequest

_ZERO_S = 60.0
_SHORT_ANSWER = 16  # of a request of the flood
_FLOOD_CLIENTS = 64
_TOKENS_OF_IDLE = 2.0  # from token to token beside the flood, against an idle server
_LEAVING_CLIENTS = 200
# Three batches' worth: one is computed, one waits, and one is on its way there or back. With fewer
# the batches would be smaller than those of the engine alone, and that would be what is measured.
_PREDICT_CLIENTS = 192
_TEXT = (
    "Not as good as the book, but the acting carries it a long way, and the last half hour is "
    "as funny as anything this year."
)
_ids = itertools.count()


@dataclass
class Streams:
    """What streaming clients saw."""

    tokens: int = 0
    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)


def bench(report: Report) -> None:
    """All four parts on one server, and the flood on one that has ``token_ms``."""
    torch.set_num_threads(THREADS)
    with (
        made() as folders,
        built(folders, report.dtype) as alone,
        running(folders.base, (*folders.generators, *folders.classifiers), report.dtype) as server,
    ):
        _streaming(report, server, alone)
        free = _flood(report, server)
        _disconnects(report, server)
        _predictions(report, server, alone)
    more = (f"--token-ms={_TOKENS_OF_IDLE * free.idle_token_s * 1e3:.1f}",)
    with (
        made() as folders,
        running(folders.base, folders.generators[:2], report.dtype, more=more) as server,
    ):
        _flood(report, server, free)


def _streaming(report: Report, server: Server, alone: Alone) -> None:
    report.section(f"HTTP: {ADAPTERS} streaming clients on {ADAPTERS} adapters")
    budget = Budget(0.0, 1, 1) if report.quick else Budget(30.0, 5, 10)
    generate_all(alone)
    asyncio.run(_stream_all(server.port, NEW_TOKENS))
    inside, outside, ratios, firsts = [], [], [], []
    tokens = ADAPTERS * NEW_TOKENS
    for _ in budget.rounds():
        began = time.perf_counter()
        generate_all(alone)
        inside.append(tokens / (time.perf_counter() - began))
        seen = asyncio.run(_stream_all(server.port, NEW_TOKENS))
        if seen.tokens != tokens:
            raise SystemExit(f"{seen.tokens} tokens were streamed, {tokens} asked for")
        outside.append(tokens / seen.seconds)
        firsts += seen.firsts
        ratios.append(outside[-1] / inside[-1])

    def add(what: str, value: Any, **more: Any) -> None:
        report.add(Figure("http", f"{ADAPTERS} streams", what, value, **more))

    add("engine without HTTP", statistics.median(inside), unit="tokens/s")
    add("through HTTP", statistics.median(outside), unit="tokens/s")
    add("HTTP against engine", ratio_of(ratios, max(outside) / max(inside)), at_least=0.85)
    note = f"{len(firsts)} requests"
    add("time to first token, p50", percentile(firsts, 0.5) * 1e3, unit="ms", note=note)
    add("time to first token, p99", percentile(firsts, 0.99) * 1e3, unit="ms", note=note)


async def _stream_all(port: int, new_tokens: int) -> Streams:
    """One stream on each adapter, all at once; connections are open before."""
    connections = [await Connection.open(port) for _ in range(ADAPTERS)]
    seen = Streams()

    async def client(number: int) -> None:
        began = time.perf_counter()
        count = 0
        async for piece in connections[number].post(*_streamed(number, new_tokens)):
            found = piece.count(b'"token":')
            if found and not count:
                seen.firsts.append(time.perf_counter() - began)
            count += found
        seen.tokens += count

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(ADAPTERS)))
    seen.seconds = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    return seen


@dataclass(frozen=True)
class Flood:
    """What a flood was, and what a server takes for a token without one."""

    per_s: float  # answers
    idle_token_s: float


def _flood(report: Report, server: Server, free: Flood | None = None) -> Flood:
    """What a flood on one adapter makes of another's latency.

    Args:
        report: Takes the figures.
        server: With these two adapters.
        free: Of a server without ``token_ms``; None: this is it.
    """
    case = f"{_FLOOD_CLIENTS} clients against 1"
    if free is not None:
        case += f", token_ms of {_TOKENS_OF_IDLE} idle tokens"
    report.section(f"HTTP: one adapter with {case}")
    idle, flooded, per_s = asyncio.run(_flooded(server.port, 4 if report.quick else 100))

    def add(what: str, value: float, **more: Any) -> None:
        report.add(Figure("http", case, what, value, **more))

    for name, found in (("idle", idle), ("flooded", flooded)):
        note = f"p50 {percentile(found, 0.5) * 1e3:.0f} ms, {len(found)} requests"
        add(f"p99 {name}", percentile(found, 0.99) * 1e3, unit="ms", note=note)
    add("p50 flooded / p50 idle", percentile(flooded, 0.5) / percentile(idle, 0.5))
    add("p99 flooded / p99 idle", percentile(flooded, 0.99) / percentile(idle, 0.99), at_most=2.5)
    add("answers of the flood", per_s, unit="answers/s")
    if free is not None:
        add("answers of the flood, of those without token_ms", per_s / free.per_s)
    return Flood(per_s, percentile(idle, 0.5) / _SHORT_ANSWER)


async def _flooded(port: int, count: int) -> tuple[list[float], list[float], float]:
    """Seconds of the single client's requests, without and with the flood; its answers a second."""
    single = await Connection.open(port)
    path, body = _asked(1, _SHORT_ANSWER)

    async def series() -> list[float]:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            await single.ask(path, body)
            seconds.append(time.perf_counter() - began)
        return seconds

    await single.ask(path, body)
    idle = await series()
    answered = 0
    over = asyncio.Event()

    async def client(connection: Connection) -> None:
        nonlocal answered
        while not over.is_set():
            await connection.ask(*_asked(0, _SHORT_ANSWER))
            answered += 1

    crowd = [await Connection.open(port) for _ in range(_FLOOD_CLIENTS)]
    tasks = [asyncio.create_task(client(connection)) for connection in crowd]
    while answered < _FLOOD_CLIENTS:  # until it flows
        await asyncio.sleep(0.05)
        _raise_if_failed(tasks)
    before, began = answered, time.perf_counter()
    flooded = await series()
    per_s = (answered - before) / (time.perf_counter() - began)
    over.set()
    await asyncio.gather(*tasks)
    for connection in (*crowd, single):
        await connection.close()
    return idle, flooded, per_s


def _disconnects(report: Report, server: Server) -> None:
    report.section(f"HTTP: {_LEAVING_CLIENTS} clients disconnect mid-stream")
    asyncio.run(_leave(report, server))


async def _leave(report: Report, server: Server) -> None:
    loop = asyncio.get_running_loop()

    async def gauges() -> tuple[float, float]:
        return await loop.run_in_executor(None, server.gauges)

    before = await gauges()
    connections = [await Connection.open(server.port) for _ in range(_LEAVING_CLIENTS)]
    started: set[int] = set()
    leave = asyncio.Event()

    async def client(number: int) -> None:
        connection = connections[number]
        pieces = connection.post(*_streamed(number % ADAPTERS, 256))
        try:
            async for piece in pieces:
                if b'"token":' in piece:
                    started.add(number)
        except (asyncio.IncompleteReadError, OSError, ValueError):
            if not leave.is_set():
                raise

    tasks = [asyncio.create_task(client(number)) for number in range(_LEAVING_CLIENTS)]
    limit = time.monotonic() + _ZERO_S
    peak = before
    # The gauges are at most two seconds old: let them see the crowd.
    while time.monotonic() < limit and (len(started) < 40 or peak[0] < _LEAVING_CLIENTS / 2):
        _raise_if_failed(tasks)
        peak = max(peak, await gauges())
        await asyncio.sleep(0.1)
    streaming, finished = len(started), sum(task.done() for task in tasks)
    leave.set()
    for connection in connections:
        connection.abort()
    began = time.monotonic()
    await asyncio.gather(*tasks, return_exceptions=True)
    now = await gauges()
    while now != (0.0, 0.0) and time.monotonic() - began < _ZERO_S:
        await asyncio.sleep(0.05)
        now = await gauges()
    seconds = time.monotonic() - began
    case = f"{_LEAVING_CLIENTS} clients leave"

    def add(what: str, value: float, unit: str, **more: Any) -> None:
        report.add(Figure("http", case, what, value, unit, **more))

    note = f"{streaming} had tokens, the others waited; {finished} were done already"
    add("active sequences before they leave", peak[0], "requests", note=note)
    add("used KV blocks before they leave", peak[1], "blocks")
    add("active sequences afterwards", now[0], "requests", at_most=0.0)
    add("used KV blocks afterwards", now[1], "blocks", at_most=0.0)
    add("until both are zero", seconds, "s", note="as /metrics shows it, which lags 1 to 2 s")


def _predictions(report: Report, server: Server, alone: Alone) -> None:
    report.section(f"HTTP: /predict, {ADAPTERS} classifiers, {_PREDICT_CLIENTS} requests at a time")
    budget = Budget(0.0, 1, 1) if report.quick else Budget(30.0, 3, 10)
    count = _PREDICT_CLIENTS if report.quick else 4 * _PREDICT_CLIENTS
    _encode_all(alone, 2 * ADAPTERS)
    asyncio.run(_predict_all(server.port, 2 * ADAPTERS))
    inside, outside, busy, rows_inside, rows_outside = [], [], [], [], []
    roles = ("engine", "worker", "http", "queues", "main", "client")
    cpu: dict[str, float] = dict.fromkeys(roles, 0.0)
    answered = 0
    for _ in budget.rounds():
        began = time.process_time()
        seconds, batch_rows = _encode_all(alone, count)
        cpu["engine"] += time.process_time() - began
        inside.append(count / seconds)
        rows_inside.append(batch_rows)
        stood, spent, began = server.steps(), server.cpu_s(), time.process_time()
        seconds = asyncio.run(_predict_all(server.port, count))
        cpu["client"] += time.process_time() - began
        for role, used in server.cpu_s().items():
            cpu[role] += used - spent.get(role, 0.0)
        steps, rows, step_s = (now - then for now, then in zip(server.steps(), stood, strict=True))
        outside.append(count / seconds)
        busy.append(step_s / seconds)
        rows_outside.append(rows / steps)
        answered += count
    ratios = [a / b for a, b in zip(outside, inside, strict=True)]

    def add(what: str, value: Any, **more: Any) -> None:
        report.add(Figure("http", "/predict at saturation", what, value, **more))

    rows_note = f"{statistics.median(rows_inside):.0f} rows a batch"
    add("engine without HTTP", statistics.median(inside), unit="texts/s", note=rows_note)
    rows_note = f"{statistics.median(rows_outside):.0f} rows a batch"
    add("through HTTP", statistics.median(outside), unit="texts/s", note=rows_note)
    add("HTTP against engine", ratio_of(ratios, max(outside) / max(inside)), at_least=0.9)
    add("share of the time in which the engine computes", statistics.median(busy), at_least=0.9)
    for role, used in cpu.items():
        add(f"CPU of a text: {role}", used / answered * 1e3, unit="ms")


def _encode_all(alone: Alone, count: int) -> tuple[float, float]:
    """Seconds for ``count`` texts, with as many under way as the HTTP clients have, and the mean
    rows of a batch."""
    engine, versions = alone.engine, alone.classifiers
    inputs = engine.text.tokenize([_TEXT], "text-classification")
    left = count
    waiting: set[str] = set()
    seen, rows = engine.last_step, []
    began = time.perf_counter()
    while left or waiting:
        while left and len(waiting) < _PREDICT_CLIENTS:
            version = versions[left % len(versions)]
            request = EncodeRequest(
                id=f"bench-{next(_ids)}",
                task="text-classification",
                adapter=version,
                version=version,
                inputs=inputs,
                submitted=time.monotonic(),
            )
            engine.submit(request)
            waiting.add(request.id)
            left -= 1
        if not engine.has_work():
            engine.wait(1.0)
        for event in engine.step():
            raise_if_failed(event)
            if isinstance(event, TERMINAL):
                waiting.discard(event.id)
        if engine.last_step is not None and engine.last_step is not seen:
            seen = engine.last_step
            rows.append(seen.rows)
    return time.perf_counter() - began, statistics.mean(rows)


async def _predict_all(port: int, count: int) -> float:
    """Seconds for ``count`` texts by a fixed number of clients."""
    connections = [await Connection.open(port) for _ in range(_PREDICT_CLIENTS)]
    numbers = iter(range(count))

    async def client(connection: Connection) -> None:
        for number in numbers:
            path = f"/predict?adapter=cls-{number % ADAPTERS}"
            await connection.ask(path, {"inputs": _TEXT})

    began = time.perf_counter()
    await asyncio.gather(*(client(connection) for connection in connections))
    seconds = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    return seconds


def _streamed(number: int, new_tokens: int) -> tuple[str, Any]:
    path = f"/generate_stream?adapter=gen-{number}"
    return path, _body(number, new_tokens)


def _asked(number: int, new_tokens: int) -> tuple[str, Any]:
    return f"/generate?adapter=gen-{number}", _body(number, new_tokens)


def _body(number: int, new_tokens: int) -> Any:
    parameters = {"max_new_tokens": new_tokens, "ignore_eos_token": True}
    return {"inputs": PROMPTS[number], "parameters": parameters}


def _raise_if_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and task.exception() is not None:
            task.result()
