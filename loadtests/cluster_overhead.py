"""What the way through a cluster costs: one engine replica on Ray Serve beside `hira serve`.

`python -m loadtests.cluster_overhead`

Both serve the demo base on one thread, on this machine and at once; the one that is not asked
idles. They are asked in turns, and each figure is the ratio of two neighbours: tokens a second of
clients that generate with the base without a pause, and the median time of a /predict, alone and
among eight. The exit status is not 0 where a ratio is below ``--goal``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from loadtests.clusters import running_cluster
from loadtests.connection import Connection, encoded
from loadtests.servers import Server, ready_server
from loadtests.verdict import verdict

NEW_TOKENS: Final = 64
GENERATE: Final = {"inputs": "The film", "parameters": {"max_new_tokens": NEW_TOKENS}}
PREDICT: Final = {"inputs": "A fine film of quiet people, warmly played and never too long."}
ADAPTERS: Final = ("hira-imdb", "hira-sst2")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.cluster_overhead", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=6, help="of both, in turns")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--clients", type=int, default=8, help="that generate together")
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hira-cluster-overhead-") as name:
        folder = Path(name)
        with (
            ready_server(folder / "one", "fp32", folder, "--threads=1") as one,
            running_cluster(folder / "cluster", replicas=1) as many,
        ):
            report = asyncio.run(measure(one, many, options))
    print(json.dumps(report, indent=1))
    missed = [kind for kind, row in report.items() if row["ratio"] < options.goal]
    return verdict([f"{kind} is below {options.goal}" for kind in missed], report, options.json)


async def measure(one: Server, many: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Ask both in turns; of each kind both figures, and the median of the rounds' ratios."""
    kinds: dict[str, Callable[[Server], Awaitable[float]]] = {
        "tokens_per_s": lambda server: tokens_per_s(server, options.clients, options.seconds),
        "predict_p50_ms": lambda server: predict_p50_ms(server, 1, options.seconds),
        "predict_p50_ms_of_8": lambda server: predict_p50_ms(server, 8, options.seconds),
    }
    report: dict[str, Any] = {}
    for kind, ask in kinds.items():
        found: dict[str, list[float]] = {"one": [], "cluster": []}
        for server in (one, many):
            await ask(server)  # strategies are chosen, and adapters loaded
        for turn in range(options.rounds):
            for name in ("one", "cluster") if turn % 2 else ("cluster", "one"):
                found[name].append(await ask({"one": one, "cluster": many}[name]))
        better = [b / a for a, b in zip(found["one"], found["cluster"], strict=True)]
        ratios = better if kind == "tokens_per_s" else [1 / one for one in better]
        report[kind] = {
            "one": round(statistics.median(found["one"]), 2),
            "cluster": round(statistics.median(found["cluster"]), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(one, 3) for one in sorted(ratios)],
        }
        print(kind, report[kind], flush=True)
    return report


async def tokens_per_s(server: Server, clients: int, seconds: float) -> float:
    """Generated tokens of ``clients`` that never pause."""
    end = time.monotonic() + seconds
    began = time.monotonic()

    async def ask(number: int) -> int:
        connection = await Connection.open(server.port)
        path = "/generate"
        body = encoded(path, {**GENERATE, "inputs": f"The film number {number}"})
        done = 0
        while time.monotonic() < end:
            reply = await connection.ask(body)
            if reply.status != 200:
                raise SystemExit(f"{server.url}{path}: {reply.code()}")
            done += NEW_TOKENS
        connection.abort()
        return done

    done = await asyncio.gather(*(ask(number) for number in range(clients)))
    return sum(done) / (time.monotonic() - began)


async def predict_p50_ms(server: Server, clients: int, seconds: float) -> float:
    """The median time of a /predict, with so many clients that never pause."""
    end = time.monotonic() + seconds

    async def ask(number: int) -> list[float]:
        connection = await Connection.open(server.port)
        body = encoded(f"/predict?adapter={ADAPTERS[number % len(ADAPTERS)]}", PREDICT)
        taken = []
        while time.monotonic() < end:
            began = time.perf_counter()
            reply = await connection.ask(body)
            if reply.status != 200:
                raise SystemExit(f"{server.url}/predict: {reply.code()}")
            taken.append(time.perf_counter() - began)
        connection.abort()
        return taken

    found = await asyncio.gather(*(ask(number) for number in range(clients)))
    return 1e3 * statistics.median(value for one in found for value in one)


if __name__ == "__main__":
    sys.exit(main())
