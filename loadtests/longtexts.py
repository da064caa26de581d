"""Short calls beside a stream of texts of megabytes: `python -m loadtests.longtexts --seconds 40`.

Long texts go to /predict, /generate and /v1/completions, one after the other, each to be refused by
its length. Beside them /health/live, a short /predict and a /generate of one token are timed, in
turns with the stream and without it, in one run. The exit status is not 0 when a call failed or one
is slower beside the stream by more than the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtests.connection import Connection, Lost, encoded
from loadtests.servers import ready_server

LONG_BYTES: Final = 6_000_000
PAUSE_S: Final = 0.02  # between calls of one kind
PATIENCE_S: Final = 60.0
WITHOUT, BESIDE = "without", "beside"
WORDS: Final = "A warm film about the king of 1984, and not so dull. "
SHORT: Final = {
    "/health/live": encoded("/health/live", method="GET"),
    "/predict": encoded("/predict?adapter=hira-imdb", {"inputs": "A fine film."}),
    "/generate": encoded(
        "/generate?adapter=hira-wiki",
        {"inputs": "The king", "parameters": {"max_new_tokens": 1}},
    ),
}
Times = dict[tuple[str, str], list[float]]  # seconds, by call and by what was beside it


def long_calls() -> list[tuple[str, bytes]]:
    text = (WORDS * (LONG_BYTES // len(WORDS) + 1))[:LONG_BYTES]
    return [
        ("/predict", encoded("/predict?adapter=hira-imdb", {"inputs": text})),
        ("/generate", encoded("/generate?adapter=hira-wiki", {"inputs": text})),
        ("/v1/completions", encoded("/v1/completions", {"model": "hira-wiki", "prompt": text})),
    ]


async def stream(port: int, over: asyncio.Event, outcomes: Counter[str]) -> None:
    """Long texts, one after the other, until it is over."""
    calls = long_calls()
    number = 0
    while not over.is_set():
        path, raw = calls[number % len(calls)]
        number += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await Connection.open(port)
                reply = await connection.ask(raw)
                connection.abort()
            outcomes[f"{path}: {reply.code()}"] += 1
        except (Lost, OSError, TimeoutError) as error:
            outcomes[f"{path}: {type(error).__name__}"] += 1


async def time_calls(
    port: int, name: str, over: asyncio.Event, found: list[float], outcomes: Counter[str]
) -> None:
    """One short call again and again, until it is over; every call that was begun counts."""
    connection = await Connection.open(port)
    while not over.is_set():
        began = time.monotonic()
        try:
            if not connection.usable:
                connection = await Connection.open(port)
            async with asyncio.timeout(PATIENCE_S):
                reply = await connection.ask(SHORT[name])
            if reply.status != 200:
                outcomes[f"short {name}: {reply.code()}"] += 1
        except (Lost, OSError, TimeoutError) as error:
            outcomes[f"short {name}: {type(error).__name__}"] += 1
            connection.abort()
        found.append(time.monotonic() - began)
        await asyncio.sleep(PAUSE_S)
    connection.abort()


async def turn(port: int, seconds: float, kind: str, times: Times, outcomes: Counter[str]) -> None:
    over = asyncio.Event()
    tasks = [
        asyncio.create_task(time_calls(port, name, over, times[name, kind], outcomes))
        for name in SHORT
    ]
    if kind == BESIDE:
        tasks.append(asyncio.create_task(stream(port, over, outcomes)))
    await asyncio.sleep(seconds)
    over.set()
    await asyncio.gather(*tasks)


async def measure(port: int, seconds: float, turns: int) -> tuple[Times, Counter[str]]:
    times: Times = {(name, kind): [] for name in SHORT for kind in (WITHOUT, BESIDE)}
    warm: Times = {key: [] for key in times}
    outcomes: Counter[str] = Counter()
    await turn(port, 1.0, WITHOUT, warm, Counter())  # adapters come to the device
    for number in range(2 * turns):
        kind = BESIDE if number % 2 else WITHOUT
        await turn(port, seconds / turns / 2, kind, times, outcomes)
    return times, outcomes


def figures(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The median, the 99th percentile and the most."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[last // 2], ordered[round(last * 0.99)], ordered[-1]


def table(times: Times) -> list[str]:
    """Milliseconds without the stream and beside it, and how much slower that is."""
    lines = [f"{'ms':<14}{'':<9}{'calls':>7}{'p50':>9}{'p99':>9}{'max':>9}"]
    for name in SHORT:
        apart, beside = (figures(times[name, kind]) for kind in (WITHOUT, BESIDE))
        slower = tuple(two - one for one, two in zip(apart, beside, strict=True))
        for kind, row in ((WITHOUT, apart), (BESIDE, beside), ("slower", slower)):
            calls = str(len(times[name, kind])) if kind != "slower" else ""
            shown = "".join(f"{1e3 * one:>9.1f}" for one in row)
            lines.append(f"{name:<14}{kind:<9}{calls:>7}{shown}")
    return lines


def slower_s(times: Times) -> dict[str, float]:
    """By how much the slowest call is slower beside the stream than the slowest without."""
    return {name: max(times[name, BESIDE]) - max(times[name, WITHOUT]) for name in SHORT}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.longtexts", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="of all turns together")
    parser.add_argument("--turns", type=int, default=4, help="of each kind")
    parser.add_argument("--limit-s", type=float, default=0.25)
    parser.add_argument("--results", type=Path, default=Path("loadtests/results"))
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ready_server(Path(folder) / "data", "fp32", options.results) as server,
    ):
        times, outcomes = asyncio.run(measure(server.port, options.seconds, options.turns))
    print("\n".join(table(times)))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:>6} {outcome}")
    faults = [
        f"{outcome} x{number}"
        for outcome, number in outcomes.items()
        if " 413 " not in outcome and "context_length_exceeded" not in outcome  # OpenAI's word
    ]
    faults += [
        f"{name} is {seconds:.2f} s slower, must be at most {options.limit_s:g} s"
        for name, seconds in slower_s(times).items()
        if seconds > options.limit_s
    ]
    print("\n".join(faults) or "all within the limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
