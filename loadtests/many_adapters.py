"""Ten thousand adapters on one machine: their start, memory, latency, listing and metrics.

`python -m loadtests.many_adapters --adapters 10000 --minutes 10`

The adapters are tiny and the base is made on the spot, so what is measured is not arithmetic. The
same server runs twice: with as few adapters as its slots hold, and with all; clients ask for them
by Zipf(1). Beside the traffic, every few seconds, adapters are listed, the metrics are read and one
more adapter is registered. Every answer must be by the adapter that was asked for, and equal to
its first answer to the same text. The exit status is not 0 when one is not, or a call fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.connection import Connection, Lost, encoded
from loadtests.servers import Server, ready_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS
from loadtests.tiny import make_classifier
from loadtests.traffic import percentile
from loadtests.verdict import verdict

ANSWER_S = 60.0
PAGE = 1000  # the most that one page of the list has
LOOK_EVERY_S = 5.0
LOOKS_AFTER_S = 2.0
WARM_S = 10.0
SHOWN = 10
RESULTS = Path("loadtests/results/many_adapters")


@dataclass
class Answers:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    first: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def take(self, name: str, text: str, named: str | None, scores: dict[str, float]) -> None:
        """Compare an answer with the first one of this adapter to this text."""
        self.asked.add(name)
        first = self.first.setdefault((name, text), scores)
        if named != name:
            self.wrong.append(f"{name} was answered by {named}")
        elif first.keys() != scores.keys():
            self.wrong.append(f"{name}: labels {sorted(scores)} in place of {sorted(first)}")
        elif (off := max(abs(first[one] - scores[one]) for one in first)) > SCORE_TOLERANCE["fp32"]:
            self.wrong.append(f"{name}: a score is off by {off:.3g}")


@dataclass
class Looks:
    """Seconds of the calls beside the traffic, and the size of what they answered."""

    page: list[float] = field(default_factory=list)  # one page of the list
    models: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    registration: list[float] = field(default_factory=list)
    metrics_bytes: int = 0
    models_bytes: int = 0
    listed: int = 0


def main() -> int:
    options = parse_options()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hira-many-"))
    try:
        report = {
            side: measure(folder / side, count, options)
            for side, count in (("few", options.few), ("many", options.adapters))
        }
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    faults = [f"{side}: {line}" for side, one in report.items() for line in one["faults"]]
    few, many = report["few"], report["many"]
    ratios = {
        "start": many["start_s"] / few["start_s"],
        "p50": many["p50_ms"] / few["p50_ms"],
        "p99": many["p99_ms"] / few["p99_ms"],
        "requests": many["requests_per_s"] / few["requests_per_s"],
        "memory_kb_of_an_adapter": {
            role: (many["resident_bytes"][role] - few["resident_bytes"][role])
            / (options.adapters - options.few)
            / 1e3
            for role in many["resident_bytes"].keys() & few["resident_bytes"].keys()
        },
    }
    told = {"options": {key: str(one) for key, one in vars(options).items()}, **report}
    told |= {"many_against_few": ratios}
    print(json.dumps(told, indent=1))
    return verdict(faults, told, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.many_adapters", description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=200, help="of the server held against")
    parser.add_argument("--minutes", type=float, default=10.0, help="of traffic on the many")
    parser.add_argument("--clients", type=int, default=16, help="connections that ask")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="keep base and adapters here, and take those that are there"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    if not 0 < options.few < options.adapters:
        parser.error("--few must be fewer than --adapters, and some")
    return options


def measure(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one server with ``count`` adapters; the few get a quarter of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "loadtests.bench.stock_many", str(folder), str(count)]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    stocked_s = time.monotonic() - began
    arguments = (
        f"--base={folder / 'base'}", f"--slots={options.slots}", "--quantization=nf4",
        f"--api-processes={options.api_processes}",
    )  # fmt: skip
    began = time.monotonic()
    with ready_server(folder / "data", "fp32", RESULTS, *arguments) as server:
        start_s = time.monotonic() - began
        names = names_of(server)
        idle = server.resident_bytes()
        seconds = 60.0 * options.minutes / (4 if count == options.few else 1)
        warm, answers, looks = Answers(), Answers(), Looks()
        asyncio.run(traffic(server, names, warm, options, seconds=WARM_S))
        answers.first = warm.first
        began = time.monotonic()
        asyncio.run(
            traffic(server, names, answers, options, seconds=seconds, beside=(looks, folder))
        )
        seconds = time.monotonic() - began
        resident = server.resident_bytes()
        counted = residency_of(server)
        stopped = server.stop()
    faults = [f"wrong: {line}" for line in (warm.wrong + answers.wrong)[:SHOWN]]
    errors = warm.errors + answers.errors
    faults += [f"error: {name} x{number}" for name, number in errors.most_common(SHOWN)]
    if len(names) < count:
        faults.append(f"{len(names)} names of {count} are listed")
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    return {
        "adapters": len(names),
        "asked_for": len(answers.asked),
        "stocked_s": round(stocked_s, 1),
        "start_s": round(start_s, 2),
        "idle_bytes": idle,
        "resident_bytes": resident,
        "requests": len(answers.seconds),
        "requests_per_s": round(len(answers.seconds) / seconds, 1),
        "p50_ms": milliseconds(answers.seconds, 0.5),
        "p99_ms": milliseconds(answers.seconds, 0.99),
        "residency": counted,
        "page_of_the_list_ms": spread(looks.page),
        "models_ms": spread(looks.models),
        "models_bytes": looks.models_bytes,
        "metrics_ms": spread(looks.metrics),
        "metrics_bytes": looks.metrics_bytes,
        "registration_ms": spread(looks.registration),
        "wrong_answers": len(warm.wrong) + len(answers.wrong),
        "faults": faults,
    }


def names_of(server: Server) -> list[str]:
    """All names, page by page, as an operator lists them."""
    found: list[str] = []
    with httpx2.Client(base_url=server.url, timeout=60, headers=server.admin) as client:
        while True:
            query = {"offset": len(found), "limit": PAGE}
            page = client.get("/admin/adapters", params=query).raise_for_status().json()
            found += [one["name"] for one in page["adapters"]]
            if len(found) >= page["total"] or not page["adapters"]:
                return found


async def traffic(
    server: Server,
    names: Sequence[str],
    answers: Answers,
    options: argparse.Namespace,
    *,
    seconds: float,
    beside: tuple[Looks, Path] | None = None,
) -> None:
    """Clients that ask again when answered, and now and then a look at everything else."""
    end = time.monotonic() + seconds
    weights = [1.0 / (place + 1) for place in range(len(names))]

    def goes_on() -> bool:
        return time.monotonic() < end

    async with asyncio.TaskGroup() as group:
        for number in range(options.clients):
            rng = random.Random(f"{options.seed}-{number}-{seconds}")
            draw = Draw(names, weights, rng)
            group.create_task(ask(server, draw, answers, goes_on))
        if beside is not None:
            group.create_task(look_on(server, *beside, goes_on))


@dataclass
class Draw:
    """A name by Zipf, and a text."""

    names: Sequence[str]
    weights: Sequence[float]
    rng: random.Random
    ahead: list[str] = field(default_factory=list)

    def next(self) -> tuple[str, str]:
        if not self.ahead:  # many at once: each call adds up all weights
            self.ahead = self.rng.choices(self.names, self.weights, k=500)
        return self.ahead.pop(), self.rng.choice(TEXTS)


async def ask(server: Server, draw: Draw, answers: Answers, goes_on: Callable[[], bool]) -> None:
    """One client: one text at a time on one connection."""
    connection: Connection | None = None
    while goes_on():
        name, text = draw.next()
        try:
            if connection is None or not connection.usable:
                connection = await Connection.open(server.port)
            began = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                reply = await connection.ask(encoded(f"/predict?adapter={name}", {"inputs": text}))
        except (Lost, OSError, TimeoutError) as error:
            answers.errors[type(error).__name__] += 1
            await asyncio.sleep(0.1)
            continue
        if reply.status != 200:
            answers.errors[reply.code()] += 1
            continue
        answers.seconds.append(time.monotonic() - began)
        scores = {row["label"]: row["score"] for row in reply.json()}
        answers.take(name, text, reply.header("X-Adapter"), scores)
    if connection is not None:
        connection.abort()


async def look_on(server: Server, looks: Looks, folder: Path, goes_on: Callable[[], bool]) -> None:
    """Every few seconds: a page of the list, the models, the metrics, one more registration."""
    source = folder / "added"
    limits = httpx2.Timeout(60.0)
    async with httpx2.AsyncClient(
        base_url=server.url, timeout=limits, headers=server.admin
    ) as client:

        async def timed(into: list[float], method: str, path: str, **more: Any) -> httpx2.Response:
            began = time.monotonic()
            answer = await client.request(method, path, **more)
            into.append(time.monotonic() - began)
            answer.raise_for_status()
            return answer

        await asyncio.sleep(LOOKS_AFTER_S)
        turn = 0
        while goes_on():
            pages = {"offset": looks.listed, "limit": 100}
            page = (await timed(looks.page, "GET", "/admin/adapters", params=pages)).json()
            looks.listed = (looks.listed + 100) % max(1, page["total"])
            looks.models_bytes = len((await timed(looks.models, "GET", "/v1/models")).content)
            looks.metrics_bytes = len((await timed(looks.metrics, "GET", "/metrics")).content)
            shutil.rmtree(source, ignore_errors=True)
            await asyncio.to_thread(make_classifier, source, seed=10**6 + turn)
            files = [("file", (path.name, path.read_bytes())) for path in source.iterdir()]
            form = {"name": "one-more", "replace": "true"}
            await timed(looks.registration, "POST", "/admin/adapters", data=form, files=files)
            turn += 1
            await asyncio.sleep(LOOK_EVERY_S)
        with suppress(httpx2.HTTPStatusError):
            await client.delete("/admin/adapters/one-more")


def residency_of(server: Server) -> dict[str, float]:
    """``hira_residency_total`` by event."""
    found: dict[str, float] = {}
    for line in httpx2.get(f"{server.url}/metrics", timeout=60).text.splitlines():
        if line.startswith("hira_residency_total{"):
            found[line.split('"')[1]] = float(line.rsplit(" ", 1)[1])
    return found


def milliseconds(seconds: Sequence[float], part: float) -> float:
    return round(percentile(seconds, part) * 1e3, 2)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and most, in milliseconds; {} of none."""
    if not seconds:
        return {}
    return {
        "median": round(statistics.median(seconds) * 1e3, 1),
        "most": round(max(seconds) * 1e3, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
