"""Replaces adapters while they are asked, and holds every answer to the version it names.

`python -m loadtests.churn --requests 200000 --replace-per-s 5`
`python -m loadtests.churn --base demo --seconds 600`

Each adapter has a pool of versions. What each version answers is learned once, alone, before the
traffic; the versions of an adapter differ clearly on at least one text. A version that was replaced
before a request was sent may not answer it any more. The exit status is not 0 when an answer was
wrong, a call failed, or the server did not keep its memory or did not go down as it should.

Without --base a tiny base is made on the spot, whose forward costs so little that many answers can
be compared on a small machine. The clients are one event loop, which is cheap as well.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.connection import Connection, Lost, Reply, encoded
from loadtests.servers import Server, memory_faults, memory_lines, ready_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive
from loadtests.tiny import make_base, make_classifier
from loadtests.verdict import verdict

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
TINY_SOURCES = 6  # random adapters that the versions are made of
ANSWER_S = 60.0
SEEDS_TRIED = 40  # to find versions of one adapter that answer differently
GROWTH_BYTES = 128 << 20  # that a process may gain under traffic
SAMPLE_S = 5.0
ERRORS_MAX = 200  # of one client, before the run is given up
SHOWN = 10  # faults of one kind that are printed
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Version:
    """One version of an adapter: what to upload, and what it must answer."""

    digest: str
    content: bytes
    answers: Mapping[str, Scores]  # by text


@dataclass
class Tenant:
    """An adapter's name, the pool that takes turns under it, and the order they were put there."""

    name: str
    pool: dict[str, Version]
    uploads: list[str]  # digests, oldest first; the last may still be on its way
    acknowledged: int = 0  # position in uploads of the last one that the server confirmed
    confirmed_at: list[tuple[int, float]] = field(default_factory=list)  # positions, and when

    def confirm(self, position: int) -> None:
        """The server has told that what stands there in ``uploads`` is served from now on."""
        self.acknowledged = position
        self.confirmed_at.append((position, time.monotonic()))

    def oldest(self, bound_s: float) -> int:
        """The position of the oldest upload that may answer a request that is sent now, where the
        server may answer by what was replaced for ``bound_s`` seconds yet."""
        if not bound_s:
            return self.acknowledged
        before = time.monotonic() - bound_s
        return max((position for position, at in self.confirmed_at if at <= before), default=0)

    def stale_s(self, digest: str, sent: float) -> float:
        """For how long ``digest`` had been replaced when a request was sent that it answered."""
        last = max(number for number, one in enumerate(self.uploads) if one == digest)
        later = [at for position, at in self.confirmed_at if position > last]
        return max(0.0, sent - min(later, default=sent))


class Quota:
    """When the traffic ends: after so many compared answers, or at a time, whichever is first.

    Args:
        requests: None: no bound on their number.
        seconds: Infinite: no bound on the time.
    """

    def __init__(self, requests: int | None, seconds: float) -> None:
        self.requests = requests
        self.end = time.monotonic() + seconds
        self.compared = 0
        self.given_up = False  # errors count for nothing: a server that only fails ends the run

    @property
    def is_open(self) -> bool:
        if self.given_up or time.monotonic() >= self.end:
            return False
        return self.requests is None or self.compared < self.requests


@dataclass
class Tally:
    """What one client saw."""

    requests: int = 0
    latencies: list[float] = field(default_factory=list)
    replace_latencies: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)  # answers by digest
    stale_s: float = 0.0  # the longest that an answer's version had been replaced before


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="hira-churn-") as folder:
        results = Path("loadtests/results/churn")
        arguments, sources = base_and_sources(Path(folder), options)
        with ready_server(Path(folder) / "data", options.dtype, results, *arguments) as server:
            began = time.monotonic()
            tenants = prepare(server, sources, options)
            versions = sum(len(tenant.pool) for tenant in tenants)
            bounds = [f"{options.requests} requests"] if options.requests else []
            bounds += [f"{options.seconds} s"] if options.seconds < math.inf else []
            print(
                f"{len(tenants)} adapters, {versions} versions learned in "
                f"{time.monotonic() - began:.1f} s; traffic: at most {' and '.join(bounds)}",
                flush=True,
            )
            report = run_traffic(server, tenants, options)
            stopped = server.stop()
    faults = report.pop("faults")
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    print_report(report)
    return verdict(faults, {**report, "faults": faults}, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.churn", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, help="of traffic at most (600 where no --requests)"
    )
    parser.add_argument("--requests", type=int, help="end when so many answers were compared")
    parser.add_argument("--base", default="tiny", help="tiny (made on the spot), demo, or a folder")
    parser.add_argument("--sources", type=Path, help="with a folder: its classifiers, in folders")
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--versions", type=int, default=4, help="in the pool of each adapter")
    parser.add_argument("--replace-per-s", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=16, help="connections that ask")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.set_defaults(bound_s=0.0)  # one machine tells all its HTTP processes at once
    options = parser.parse_args()
    if options.versions < 2:
        parser.error("--versions must be at least 2: there is nothing to replace with otherwise")
    if options.requests is not None and options.requests < 1:
        parser.error("--requests must be at least 1")
    if (options.base not in ("tiny", "demo")) != (options.sources is not None):
        parser.error("--base FOLDER needs --sources, and nothing else does")
    if options.seconds is None:
        options.seconds = 600.0 if options.requests is None else math.inf
    return options


def base_and_sources(
    folder: Path, options: argparse.Namespace
) -> tuple[tuple[str, ...], list[Path]]:
    """Arguments of the server for the base, and the folders of classifiers to make versions of."""
    if options.base == "tiny":
        base = make_base(folder / "base", seed=options.seed)
        made = folder / "adapters"
        sources = [make_classifier(made / str(one), seed=one) for one in range(TINY_SOURCES)]
        return (f"--base={base}",), sources
    held = DEMO_DIR if options.base == "demo" else options.sources
    sources = sorted(path for path in held.iterdir() if (path / "config.json").is_file())
    return (() if options.base == "demo" else (f"--base={options.base}",)), sources


def prepare(server: Server, sources: list[Path], options: argparse.Namespace) -> list[Tenant]:
    """Register the adapters and learn, one request at a time, what each version answers."""
    tolerance = SCORE_TOLERANCE[options.dtype]
    tenants: list[Tenant] = []
    seed = 0
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        for index in range(options.adapters):
            name = f"churn-{index:02d}"
            tenant = Tenant(name, {}, [])
            for _ in range(SEEDS_TRIED):
                if len(tenant.pool) == options.versions:
                    break
                content = archive(sources[index % len(sources)], seed)
                seed += 1
                version = learn(client, server, name, content, options.bound_s)
                tenant.uploads = [version.digest]
                # On some text no answer can then pass for that of another version.
                if all(apart(version, one) > 2 * tolerance for one in tenant.pool.values()):
                    tenant.pool[version.digest] = version
            if len(tenant.pool) < options.versions:
                raise SystemExit(f"no {options.versions} versions that differ for {name}")
            tenants.append(tenant)
    return tenants


def learn(
    client: httpx2.Client, server: Server, name: str, content: bytes, bound_s: float = 0.0
) -> Version:
    """Put one version under ``name`` and, when all know it, ask it everything, alone."""
    digest = upload(client, server, name, content)
    time.sleep(bound_s)
    answers: dict[str, Scores] = {}
    for text in TEXTS:
        reply = client.post("/predict", params={"adapter": name}, json={"inputs": text})
        reply.raise_for_status()
        if reply.headers["X-Adapter-Version"] != digest:
            raise SystemExit(
                f"{name} answers as {reply.headers['X-Adapter-Version']}, not {digest}"
            )
        answers[text] = scores_of(reply.json())
    return Version(digest, content, answers)


def upload(client: httpx2.Client, server: Server, name: str, content: bytes) -> str:
    """Register or replace; returns the version that the server says is there now."""
    reply = client.post(
        "/admin/adapters",
        data={"name": name, "replace": "true"},
        files={"file": (f"{name}.tar", content)},
        headers=server.admin,
    )
    reply.raise_for_status()
    return str(reply.json()["version"])


def scores_of(rows: Sequence[Mapping[str, Any]]) -> Scores:
    return {str(row["label"]): float(row["score"]) for row in rows}


def apart(one: Version, other: Version) -> float:
    """By how much two versions differ on the text on which they differ most."""
    return max(
        abs(score - other.answers[text][label])
        for text, scores in one.answers.items()
        for label, score in scores.items()
    )


def run_traffic(
    server: Server, tenants: list[Tenant], options: argparse.Namespace
) -> dict[str, Any]:
    """Ask and replace until the quota is used; returns the figures, with ``faults`` among them."""
    before = server.resident_bytes()
    quota = Quota(options.requests, options.seconds)
    asked = [Tally() for _ in range(options.clients)]
    replaced = Tally()
    peak = dict(before)
    threads = [
        threading.Thread(target=watch, args=(server, peak, quota)),
        threading.Thread(target=replace, args=(server, tenants, replaced, quota, options)),
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        asyncio.run(ask_all(server, tenants, asked, quota, options))
    finally:
        quota.given_up = True  # for the threads, whatever ended the clients
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join()
    memory = {"before": before, "after": server.resident_bytes(), "peak": peak}
    figures = summary(asked, replaced, seconds, tenants, memory)
    if options.requests and quota.compared < options.requests and options.seconds == math.inf:
        figures["faults"].append(f"only {quota.compared} of {options.requests} answers compared")
    return figures


def watch(server: Server, peak: dict[str, int], quota: Quota) -> None:
    """Note the highest resident memory of each process."""
    due = time.monotonic() + SAMPLE_S
    while quota.is_open:
        time.sleep(0.2)
        if time.monotonic() < due:
            continue
        due += SAMPLE_S
        for role, amount in server.resident_bytes().items():
            peak[role] = max(peak.get(role, 0), amount)


async def ask_all(
    server: Server,
    tenants: list[Tenant],
    tallies: list[Tally],
    quota: Quota,
    options: argparse.Namespace,
) -> None:
    async with asyncio.TaskGroup() as group:
        for number, tally in enumerate(tallies):
            group.create_task(ask(server, tenants, tally, quota, options, number=number))


async def ask(
    server: Server,
    tenants: list[Tenant],
    tally: Tally,
    quota: Quota,
    options: argparse.Namespace,
    *,
    number: int,
) -> None:
    """One client: random adapters, one text or three at a time, on one connection."""
    rng = random.Random(f"{options.seed}-client-{number}")
    tolerance = SCORE_TOLERANCE[options.dtype]
    connection: Connection | None = None
    while quota.is_open:
        tenant = rng.choice(tenants)
        texts = rng.sample(TEXTS, rng.choice((1, 1, 1, 3)))
        body = {"inputs": texts if len(texts) > 1 else texts[0]}
        oldest = tenant.oldest(options.bound_s)
        began = time.monotonic()
        tally.requests += 1
        try:
            if connection is None or not connection.usable:
                connection = await Connection.open(server.port)
            async with asyncio.timeout(ANSWER_S):
                reply = await connection.ask(encoded(f"/predict?adapter={tenant.name}", body))
        except (Lost, OSError, TimeoutError) as error:
            tally.errors[type(error).__name__] += 1
            await failed(tally, quota)
            continue
        tally.latencies.append(time.monotonic() - began)
        if reply.status != 200:
            tally.errors[reply.code()] += 1
            await failed(tally, quota)
            continue
        fault = fault_in(reply, tenant, texts, oldest, tolerance)
        if fault is not None:
            tally.wrong.append(f"{tenant.name}: {fault}")
        else:
            digest = reply.header("X-Adapter-Version") or ""
            tally.stale_s = max(tally.stale_s, tenant.stale_s(digest, began))
        tally.served[reply.header("X-Adapter-Version") or ""] += 1
        quota.compared += 1
    if connection is not None:
        connection.abort()


async def failed(tally: Tally, quota: Quota) -> None:
    """After a call without an answer: not at once again, and not for ever."""
    await asyncio.sleep(0.1)
    if sum(tally.errors.values()) >= ERRORS_MAX:
        quota.given_up = True


def fault_in(
    reply: Reply, tenant: Tenant, texts: Sequence[str], oldest: int, tolerance: float
) -> str | None:
    """None, or one line on what is wrong with an answer.

    Args:
        reply: With status 200.
        tenant: That was asked.
        texts: That it was asked.
        oldest: Position in the adapter's uploads of the one that was confirmed when it was asked:
            no version from before may answer.
        tolerance: By how much a score may be off.
    """
    name, digest = map(reply.header, ("X-Adapter", "X-Adapter-Version"))
    if name != tenant.name:
        return f"answered by {name}"
    if digest not in tenant.pool:
        return f"answered by version {digest}, which was never uploaded under this name"
    if digest not in tenant.uploads[oldest:]:
        return f"answered by version {digest}, which was replaced before the request was sent"
    answers = reply.json() if len(texts) > 1 else [reply.json()]
    if len(answers) != len(texts):
        return f"{len(answers)} answers to {len(texts)} texts"
    for text, rows in zip(texts, answers, strict=True):
        expected, found = tenant.pool[digest].answers[text], scores_of(rows)
        if expected.keys() != found.keys():
            return f"labels {sorted(found)} in place of {sorted(expected)}"
        worst = max(abs(expected[label] - found[label]) for label in expected)
        if not worst <= tolerance:  # also true for NaN
            return f"version {digest}: a score is off by {worst:.3g} (allowed {tolerance:g})"
    return None


def replace(
    server: Server, tenants: list[Tenant], tally: Tally, quota: Quota, options: argparse.Namespace
) -> None:
    """Put another version under a random name, at the given rate."""
    rng = random.Random(f"{options.seed}-replacer")
    due = time.monotonic()
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        while quota.is_open:
            tenant = rng.choice(tenants)
            chosen = tenant.pool[rng.choice(sorted(tenant.pool.keys() - {tenant.uploads[-1]}))]
            tenant.uploads.append(chosen.digest)
            began = time.monotonic()
            tally.requests += 1
            try:
                digest = upload(client, server, tenant.name, chosen.content)
            except httpx2.HTTPStatusError as error:
                tally.errors[f"replace: {status_and_code(error.response)}"] += 1
            except httpx2.HTTPError as error:
                tally.errors[f"replace: {type(error).__name__}"] += 1
            else:
                tally.replace_latencies.append(time.monotonic() - began)
                if digest == chosen.digest:
                    tenant.confirm(len(tenant.uploads) - 1)
                else:
                    tally.wrong.append(f"{tenant.name}: uploaded {chosen.digest}, told {digest}")
            due += 1.0 / options.replace_per_s
            time.sleep(max(0.0, due - time.monotonic()))


def status_and_code(reply: httpx2.Response) -> str:
    try:
        return f"{reply.status_code} {reply.json()['code']}"
    except (ValueError, KeyError, TypeError):
        return str(reply.status_code)


def summary(
    asked: list[Tally],
    replaced: Tally,
    seconds: float,
    tenants: list[Tenant],
    memory: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """All figures of a run as values for JSON."""
    wrong = [line for tally in (*asked, replaced) for line in tally.wrong]
    errors = sum((tally.errors for tally in (*asked, replaced)), Counter[str]())
    served = sum((tally.served for tally in asked), Counter[str]())
    latencies = [value for tally in asked for value in tally.latencies]
    requests = sum(tally.requests for tally in asked)
    faults = [f"wrong: {line}" for line in wrong[:SHOWN]]
    faults += [f"error: {name} x{count}" for name, count in errors.most_common(SHOWN)]
    faults += memory_faults(memory["before"], memory["after"], GROWTH_BYTES)
    if not requests or not replaced.replace_latencies:
        faults.append("nothing was asked, or nothing was replaced")
    return {
        "seconds": round(seconds, 1),
        "adapters": len(tenants),
        "versions": sum(len(tenant.pool) for tenant in tenants),
        "versions_that_answered": len(served),
        "requests": requests,
        "replacements": len(replaced.replace_latencies),
        "wrong_answers": len(wrong),
        "errors": dict(errors),
        "latency_ms": percentiles(latencies),
        "replace_latency_ms": percentiles(replaced.replace_latencies),
        "resident_bytes": memory,
        "faults": faults,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    ordered = sorted(seconds) or [float("nan")]
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[round(part * last)] * 1e3, 1) for name, part in at.items()}


def print_report(report: Mapping[str, Any]) -> None:
    seconds = report["seconds"]
    errors = report["errors"]
    print(f"\n{'what':<26}{'count':>10}{'per s':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for title, count, latency in (
        ("/predict", report["requests"], report["latency_ms"]),
        ("replacements", report["replacements"], report["replace_latency_ms"]),
    ):
        row = f"{title:<26}{count:>10}{count / seconds:>9.2f}"
        print(row + "".join(f"{latency[name]:>9.1f}" for name in ("p50", "p99", "max")))
    print(f"{'wrong answers':<26}{report['wrong_answers']:>10}")
    print(f"{'errors':<26}{sum(errors.values()):>10}")
    for name, count in sorted(errors.items()):
        print(f"  {name:<24}{count:>10}")
    print(f"{'versions that answered':<26}{report['versions_that_answered']:>10}")
    print(f"  of {report['versions']} of {report['adapters']} adapters, in {seconds} s\n")
    memory = report["resident_bytes"]
    print("\n".join(memory_lines(memory["before"], memory["after"], memory["peak"])))


if __name__ == "__main__":
    sys.exit(main())
