"""A canary on a share of the traffic, and rollbacks under traffic; every answer is compared.

`python -m loadtests.versions --requests 10000 --share 10 --rollbacks 20`

One adapter has three versions that differ clearly; what each answers is learned once, alone. First
one of them answers a share of the requests: each answer must be the one of the version that its
header names, and the share what was asked for. Then, again and again, a bad version is put under
the name and rolled back while clients ask: no request that is sent after the acknowledgement may
be answered by it, and the time from there to its last answer is measured. The exit status is not 0
when an answer was wrong, a call failed, or the share is off by more than chance allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.churn import (
    SHOWN,
    Version,
    apart,
    base_and_sources,
    learn,
    percentiles,
    scores_of,
    upload,
)
from loadtests.connection import Connection, Lost, Reply, encoded
from loadtests.servers import Server, ready_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive
from loadtests.verdict import verdict

NAME = "versions"
WANTED_VERSIONS = 3
SEEDS = 60  # tried to find versions that differ
ANSWER_S = 60.0
CHANCE = 3.9  # standard deviations that a share may be off: once in ten thousand runs
BETWEEN_S = 0.4  # of traffic after each rollback, and before it
BAD_ANSWER_S = 60.0  # for the bad version to answer somebody before it is rolled back


@dataclass
class Seen:
    """What the clients saw."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by arm and version
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    # Of each answer: when its request was sent, when it was there, the version; of the rollbacks.
    times: list[tuple[float, float, str]] = field(default_factory=list)


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="hira-versions-") as folder:
        arguments, sources = base_and_sources(Path(folder), options)
        results = Path("loadtests/results/versions")
        process = f"--api-processes={options.api_processes}"
        with ready_server(
            Path(folder) / "data", options.dtype, results, process, *arguments
        ) as server:
            versions = prepare(server, sources, options)
            report = {
                "canary": try_canary(server, versions, options),
                "rollback": roll_back(server, versions, options),
            }
            stopped = server.stop()
    faults = [fault for part in report.values() for fault in part["faults"]]
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    print(json.dumps(report, indent=1))
    return verdict(faults, report, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.versions", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="while the canary runs")
    parser.add_argument("--share", type=float, default=10.0, help="of the canary, in percent")
    parser.add_argument("--rollbacks", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16, help="connections that ask")
    parser.add_argument("--base", default="demo", help="tiny (made on the spot), demo, or a folder")
    parser.add_argument("--sources", type=Path, help="with a folder: its classifiers, in folders")
    parser.add_argument("--api-processes", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def prepare(server: Server, sources: Sequence[Path], options: argparse.Namespace) -> list[Version]:
    """Versions of one adapter that differ on some text by more than a score may be off."""
    tolerance = SCORE_TOLERANCE[options.dtype]
    found: list[Version] = []
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        for seed in range(options.seed, options.seed + SEEDS):
            version = learn(client, server, NAME, archive(sources[0], seed))
            if all(apart(version, one) > 2 * tolerance for one in found):
                found.append(version)
            if len(found) == WANTED_VERSIONS:
                return found
    raise SystemExit("no versions that differ")


def try_canary(
    server: Server, versions: Sequence[Version], options: argparse.Namespace
) -> dict[str, Any]:
    """Give one version a share of the requests and compare every answer."""
    stable, canary, _ = versions
    with httpx2.Client(base_url=server.url, timeout=120, headers=server.admin) as client:
        upload(client, server, NAME, stable.content)
        staged = client.post(
            "/admin/adapters",
            data={"name": NAME, "stage": "true"},
            files={"file": (f"{NAME}.tar", canary.content)},
        )
        staged.raise_for_status()
        body = {"version": staged.json()["version"], "share": options.share}
        client.put(f"/admin/adapters/{NAME}/canary", json=body).raise_for_status()
        seen, left = Seen(), iter(range(options.requests))
        began = time.monotonic()
        asyncio.run(ask_all(server, versions, seen, options, lambda: next(left, None) is not None))
        seconds = time.monotonic() - began
        client.delete(f"/admin/adapters/{NAME}/canary").raise_for_status()
    total = sum(seen.answers.values())
    drawn = sum(count for (arm, _), count in seen.answers.items() if arm == "canary")
    share = options.share / 100
    allowed = CHANCE * (share * (1 - share) / max(1, total)) ** 0.5
    faults = faults_of(seen)
    mixed = set(seen.answers) - {("stable", stable.digest), ("canary", canary.digest)}
    faults += [f"{arm} was answered by {version}" for arm, version in mixed]
    if abs(drawn / max(1, total) - share) > allowed:
        faults.append(f"{drawn} of {total} requests drew the canary, not {options.share:g} %")
    return {
        "requests": total,
        "canary_requests": drawn,
        "canary_percent": round(100 * drawn / max(1, total), 3),
        "allowed_percent": [round(100 * (share + sign * allowed), 3) for sign in (-1, 1)],
        "wrong_answers": len(seen.wrong),
        "requests_per_s": round(total / seconds, 1),
        "faults": faults,
    }


def roll_back(
    server: Server, versions: Sequence[Version], options: argparse.Namespace
) -> dict[str, Any]:
    """Put a bad version under the name and roll it back, while clients ask."""
    good, _, bad = versions
    seen, rollbacks = Seen(), list[tuple[float, float, float]]()  # put, rolled back, acknowledged

    async def answered_by_bad(before: int) -> None:
        until = time.monotonic() + BAD_ANSWER_S
        while time.monotonic() < until:
            await asyncio.sleep(BETWEEN_S)
            if any(one[2] == bad.digest for one in seen.times[before:]):
                return

    async def run() -> None:
        ended = asyncio.Event()
        clients = asyncio.create_task(
            ask_all(server, versions, seen, options, lambda: not ended.is_set())
        )
        with httpx2.Client(base_url=server.url, timeout=120, headers=server.admin) as client:
            for _ in range(options.rollbacks):
                put, before = time.monotonic(), len(seen.times)
                await asyncio.to_thread(upload, client, server, NAME, bad.content)
                await answered_by_bad(before)
                asked = time.monotonic()
                answer = await asyncio.to_thread(
                    client.post, f"/admin/adapters/{NAME}/rollback", json={}
                )
                rollbacks.append((put, asked, time.monotonic()))
                answer.raise_for_status()
                if answer.json()["version"] != good.digest:
                    seen.wrong.append(f"rolled back to {answer.json()['version']}")
                await asyncio.sleep(BETWEEN_S)
        ended.set()
        await clients

    asyncio.run(run())
    late, last_answers = 0, []
    ends = [put for put, _, _ in rollbacks[1:]] + [math.inf]
    for (put, _, acknowledged), end in zip(rollbacks, ends, strict=True):
        by_bad = [one for one in seen.times if put <= one[0] < end and one[2] == bad.digest]
        late += sum(sent > acknowledged for sent, _, _ in by_bad)
        if by_bad:
            last_answers.append(max(0.0, max(there for _, there, _ in by_bad) - acknowledged))
    faults = faults_of(seen)
    if late:
        faults.append(f"{late} requests sent after the acknowledgement were answered by what left")
    if len(last_answers) < len(rollbacks):
        faults.append("some bad version answered nobody: nothing was measured")
    return {
        "rollbacks": len(rollbacks),
        "requests": len(seen.times),
        "answers_of_the_bad_version": sum(one[2] == bad.digest for one in seen.times),
        "late_requests": late,
        "wrong_answers": len(seen.wrong),
        "rollback_ms": percentiles([done - asked for _, asked, done in rollbacks]),
        "last_bad_answer_after_acknowledgement_ms": percentiles(last_answers),
        "answer_ms": percentiles([there - sent for sent, there, _ in seen.times]),
        "faults": faults,
    }


async def ask_all(
    server: Server,
    versions: Sequence[Version],
    seen: Seen,
    options: argparse.Namespace,
    goes_on: Callable[[], bool],
) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(options.clients):
            group.create_task(
                ask(server, versions, seen, goes_on, dtype=options.dtype, number=number)
            )


async def ask(
    server: Server,
    versions: Sequence[Version],
    seen: Seen,
    goes_on: Callable[[], bool],
    *,
    dtype: str,
    number: int,
) -> None:
    """One client: one text at a time on one connection."""
    connection: Connection | None = None
    turn = number
    while goes_on():
        text = TEXTS[turn % len(TEXTS)]
        turn += 1
        try:
            if connection is None or not connection.usable:
                connection = await Connection.open(server.port)
            sent = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                reply = await connection.ask(encoded(f"/predict?adapter={NAME}", {"inputs": text}))
        except (Lost, OSError, TimeoutError) as error:
            seen.errors[type(error).__name__] += 1
            await asyncio.sleep(0.1)
            continue
        digest = reply.header("X-Adapter-Version") or ""
        seen.times.append((sent, time.monotonic(), digest))
        if reply.status != 200:
            seen.errors[reply.code()] += 1
            continue
        seen.answers[reply.header("X-Adapter-Arm") or "", digest] += 1
        fault = fault_in_reply(reply, versions, text, SCORE_TOLERANCE[dtype])
        if fault is not None:
            seen.wrong.append(fault)
    if connection is not None:
        connection.abort()


def fault_in_reply(
    reply: Reply, versions: Sequence[Version], text: str, tolerance: float
) -> str | None:
    """None, or one line on how an answer differs from that of the version that it names."""
    digest = reply.header("X-Adapter-Version")
    named = next((one for one in versions if one.digest == digest), None)
    if named is None:
        return f"answered by version {digest}, which nobody uploaded"
    expected, found = named.answers[text], scores_of(reply.json())
    if expected.keys() != found.keys():
        return f"labels {sorted(found)} in place of {sorted(expected)}"
    worst = max(abs(expected[label] - found[label]) for label in expected)
    return None if worst <= tolerance else f"version {digest}: a score is off by {worst:.3g}"


def faults_of(seen: Seen) -> list[str]:
    return [
        *(f"wrong: {line}" for line in seen.wrong[:SHOWN]),
        *(f"error: {name} x{count}" for name, count in seen.errors.most_common(SHOWN)),
    ]


if __name__ == "__main__":
    sys.exit(main())
