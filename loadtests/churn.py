"""Replaces adapters while they are asked, and holds every answer to the version it names.

`python -m loadtests.churn --seconds 600 --adapters 20 --replace-per-s 2 --clients 4`

Each adapter has a pool of versions. What each version answers is learned once, alone, before the
traffic; the versions of an adapter differ clearly on at least one text. A version that was replaced
before a request was sent may not answer it any more. The exit status is not 0 when an answer was
wrong, a call failed, or the server did not keep its memory or did not go down as it should.
"""

from __future__ import annotations

import argparse
import json
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

import httpx

from loadtests.servers import Server, memory_faults, memory_lines, ready_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
SEEDS_TRIED = 40  # to find versions of one adapter that answer differently
GROWTH_BYTES = 128 << 20  # that a process may gain under traffic
SAMPLE_S = 5.0
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


@dataclass
class Tally:
    """What one thread saw."""

    requests: int = 0
    latencies: list[float] = field(default_factory=list)
    replace_latencies: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)  # answers by digest


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="hira-churn-") as folder:
        results = Path("loadtests/results/churn")
        with ready_server(Path(folder), options.dtype, results) as server:
            began = time.monotonic()
            tenants = prepare(server, options)
            versions = sum(len(tenant.pool) for tenant in tenants)
            print(
                f"{len(tenants)} adapters, {versions} versions learned in "
                f"{time.monotonic() - began:.1f} s; {options.seconds} s of traffic",
                flush=True,
            )
            report = run_traffic(server, tenants, options)
            stopped = server.stop()
    faults = report.pop("faults")
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    print_report(report)
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({**report, "faults": faults}, indent=1) + "\n")
    return 1 if faults else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.churn", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--versions", type=int, default=4, help="in the pool of each adapter")
    parser.add_argument("--replace-per-s", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=4, help="threads that ask")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    if options.versions < 2:
        parser.error("--versions must be at least 2: there is nothing to replace with otherwise")
    return options


def prepare(server: Server, options: argparse.Namespace) -> list[Tenant]:
    """Register the adapters and learn, one request at a time, what each version answers."""
    sources = sorted(path for path in DEMO_DIR.iterdir() if (path / "config.json").is_file())
    tolerance = SCORE_TOLERANCE[options.dtype]
    tenants: list[Tenant] = []
    seed = 0
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for index in range(options.adapters):
            name = f"churn-{index:02d}"
            tenant = Tenant(name, {}, [])
            for _ in range(SEEDS_TRIED):
                if len(tenant.pool) == options.versions:
                    break
                content = archive(sources[index % len(sources)], seed)
                seed += 1
                version = learn(client, server, name, content)
                tenant.uploads = [version.digest]
                # On some text no answer can then pass for that of another version.
                if all(apart(version, one) > 2 * tolerance for one in tenant.pool.values()):
                    tenant.pool[version.digest] = version
            if len(tenant.pool) < options.versions:
                raise SystemExit(f"no {options.versions} versions that differ for {name}")
            tenants.append(tenant)
    return tenants


def learn(client: httpx.Client, server: Server, name: str, content: bytes) -> Version:
    """Put one version under ``name`` and ask it everything, alone."""
    digest = upload(client, server, name, content)
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


def upload(client: httpx.Client, server: Server, name: str, content: bytes) -> str:
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
    """Ask and replace for the given time; returns the figures, with ``faults`` among them."""
    before = server.resident_bytes()
    end = time.monotonic() + options.seconds
    asked = [Tally() for _ in range(options.clients)]
    replaced = Tally()
    peak = dict(before)
    threads = [
        threading.Thread(
            target=ask, args=(server, tenants, tally, end, options), kwargs={"number": number}
        )
        for number, tally in enumerate(asked)
    ]
    threads.append(threading.Thread(target=replace, args=(server, tenants, replaced, end, options)))
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(min(SAMPLE_S, max(0.0, end - time.monotonic())))
        for role, amount in server.resident_bytes().items():
            peak[role] = max(peak.get(role, 0), amount)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    memory = {"before": before, "after": server.resident_bytes(), "peak": peak}
    return summary(asked, replaced, seconds, tenants, memory)


def ask(
    server: Server,
    tenants: list[Tenant],
    tally: Tally,
    end: float,
    options: argparse.Namespace,
    *,
    number: int,
) -> None:
    """One client: random adapters, one text or three at a time."""
    rng = random.Random(f"{options.seed}-client-{number}")
    tolerance = SCORE_TOLERANCE[options.dtype]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while time.monotonic() < end:
            tenant = rng.choice(tenants)
            texts = rng.sample(TEXTS, rng.choice((1, 1, 1, 3)))
            body = {"inputs": texts if len(texts) > 1 else texts[0]}
            oldest = tenant.acknowledged
            began = time.monotonic()
            tally.requests += 1
            try:
                reply = client.post("/predict", params={"adapter": tenant.name}, json=body)
            except httpx.HTTPError as error:
                tally.errors[type(error).__name__] += 1
                continue
            tally.latencies.append(time.monotonic() - began)
            if reply.status_code != 200:
                tally.errors[status_and_code(reply)] += 1
                continue
            fault = fault_in(reply, tenant, texts, oldest, tolerance)
            if fault is not None:
                tally.wrong.append(f"{tenant.name}: {fault}")
            tally.served[reply.headers.get("X-Adapter-Version", "")] += 1


def fault_in(
    reply: httpx.Response, tenant: Tenant, texts: Sequence[str], oldest: int, tolerance: float
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
    name, digest = (reply.headers.get(key) for key in ("X-Adapter", "X-Adapter-Version"))
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
    server: Server, tenants: list[Tenant], tally: Tally, end: float, options: argparse.Namespace
) -> None:
    """Put another version under a random name, at the given rate."""
    rng = random.Random(f"{options.seed}-replacer")
    due = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while time.monotonic() < end:
            tenant = rng.choice(tenants)
            chosen = tenant.pool[rng.choice(sorted(tenant.pool.keys() - {tenant.uploads[-1]}))]
            tenant.uploads.append(chosen.digest)
            began = time.monotonic()
            tally.requests += 1
            try:
                digest = upload(client, server, tenant.name, chosen.content)
            except httpx.HTTPStatusError as error:
                tally.errors[f"replace: {status_and_code(error.response)}"] += 1
            except httpx.HTTPError as error:
                tally.errors[f"replace: {type(error).__name__}"] += 1
            else:
                tally.replace_latencies.append(time.monotonic() - began)
                if digest == chosen.digest:
                    tenant.acknowledged = len(tenant.uploads) - 1
                else:
                    tally.wrong.append(f"{tenant.name}: uploaded {chosen.digest}, told {digest}")
            due += 1.0 / options.replace_per_s
            time.sleep(max(0.0, due - time.monotonic()))


def status_and_code(reply: httpx.Response) -> str:
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
