"""Replaces and removes adapters of a cluster while they are asked: `loadtests.churn` on Ray Serve.

`python -m loadtests.cluster_churn --requests 100000 --replicas 3`

As on one machine, every answer is held to the version that it names, and no version that was
replaced longer than ``--bound-s`` before a request was sent may answer it. Beside that, names come
and go: one that was removed, and the removal acknowledged, may soon not be answered any more, one
that was registered must be. At the end the registry must say what was acknowledged last of every
name. For how long answers were stale is measured under load, and by changes one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.churn import (
    Quota,
    Tally,
    Tenant,
    ask_all,
    base_and_sources,
    percentiles,
    prepare,
    replace,
    upload,
)
from loadtests.clusters import ClusterServer, running_cluster
from loadtests.connection import Connection, encoded
from loadtests.verdict import verdict

STALE_MAX_S = 2.0
PASSERS = 4  # names that come and go
SHOWN = 10
TEXT = {"inputs": "A fine film, warmly played."}


@dataclass
class Passing:
    """What was seen of names that come and go.

    Args:
        changes: Registrations and removals that were acknowledged.
        wrong: Answers that should not have been.
        errors: Calls that failed, by why.
        there: By name, the version that was acknowledged last; None where it was removed.
    """

    changes: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    there: dict[str, str | None] = field(default_factory=dict)


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="hira-cluster-churn-") as name:
        folder = Path(name)
        arguments, sources = base_and_sources(folder, options)
        with running_cluster(
            folder / "cluster",
            *arguments,
            replicas=options.replicas,
            http_replicas=options.http_replicas,
            with_objects=options.objects,
        ) as server:
            began = time.monotonic()
            tenants = prepare(server, sources, options)
            print(
                f"{len(tenants)} adapters, {options.versions} versions each, learned in "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            report = run(server, tenants, options)
    faults = report.pop("faults")
    print(json.dumps(report, indent=1))
    return verdict(faults, {**report, "faults": faults}, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.cluster_churn", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of traffic at most")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--http-replicas", type=int, default=2)
    parser.add_argument("--objects", action="store_true", help="adapters in an object store")
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--versions", type=int, default=3, help="in the pool of each adapter")
    parser.add_argument("--replace-per-s", type=float, default=1.4)
    parser.add_argument("--pass-per-s", type=float, default=0.6, help="registrations and removals")
    parser.add_argument("--bound-s", type=float, default=STALE_MAX_S, help="of staleness")
    parser.add_argument("--clients", type=int, default=16, help="connections that ask")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.base, options.dtype, options.sources = "tiny", "fp32", None
    return options


def run(
    server: ClusterServer, tenants: list[Tenant], options: argparse.Namespace
) -> dict[str, Any]:
    """Ask, replace, register and remove until the quota is used."""
    before = server.resident_bytes()
    quota = Quota(options.requests, options.seconds)
    asked = [Tally() for _ in range(options.clients)]
    replaced, passing = Tally(), Passing()
    threads = [
        threading.Thread(target=replace, args=(server, tenants, replaced, quota, options)),
        threading.Thread(target=come_and_go, args=(server, tenants, passing, quota, options)),
        threading.Thread(target=tell, args=(quota, asked)),
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        asyncio.run(ask_all(server, tenants, asked, quota, options))
    finally:
        quota.given_up = True
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join()
    lost = lost_changes(server, tenants, passing)
    stale_s = [staleness_s(server, tenants, number) for number in range(10)]
    wrong = [line for one in (*asked, replaced) for line in one.wrong] + passing.wrong
    errors = sum((one.errors for one in (*asked, replaced)), Counter[str]()) + passing.errors
    faults = [f"wrong: {line}" for line in wrong[:SHOWN]] + [f"lost: {line}" for line in lost]
    faults += [f"error: {name} x{count}" for name, count in errors.most_common(SHOWN)]
    stale_s.append(max(one.stale_s for one in asked))  # the same under load, of all answers
    if max(stale_s) > options.bound_s:
        faults.append(f"stale for {max(stale_s):.2f} s")
    if not options.seconds < math.inf and quota.compared < options.requests:
        faults.append(f"only {quota.compared} answers compared")
    return {
        "replicas": options.replicas,
        "http_replicas": options.http_replicas,
        "seconds": round(seconds, 1),
        "answers_compared": quota.compared,
        "answers_per_s": round(quota.compared / seconds, 1),
        "changes_acknowledged": len(replaced.replace_latencies) + passing.changes,
        "changes_per_s": round((len(replaced.replace_latencies) + passing.changes) / seconds, 2),
        "wrong": len(wrong),
        "lost_acknowledgements": len(lost),
        "errors": dict(errors),
        "latency_ms": percentiles([value for one in asked for value in one.latencies]),
        "change_latency_ms": percentiles(replaced.replace_latencies),
        "stale_s_under_load": round(stale_s.pop(), 2),
        "stale_s_alone": [round(one, 2) for one in sorted(stale_s)],
        "resident_mib": {
            role: [round(before.get(role, 0) / 2**20), round(amount / 2**20)]
            for role, amount in server.resident_bytes().items()
        },
        "faults": faults,
    }


def tell(quota: Quota, asked: list[Tally]) -> None:
    """How far it is, once a minute."""
    due = time.monotonic() + 60
    while quota.is_open:
        time.sleep(0.5)
        if time.monotonic() > due:
            due += 60
            wrong = sum(len(one.wrong) for one in asked)
            print(f"{quota.compared} answers compared, {wrong} wrong", flush=True)


def come_and_go(
    server: ClusterServer,
    tenants: list[Tenant],
    passing: Passing,
    quota: Quota,
    options: argparse.Namespace,
) -> None:
    """Register names and remove them, and ask for each right after its change was acknowledged."""
    rng = random.Random(f"{options.seed}-passers")
    due = time.monotonic()
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        while quota.is_open:
            name = f"passing-{rng.randrange(PASSERS)}"
            try:
                if passing.there.get(name) is None:
                    pool = rng.choice(tenants).pool
                    chosen = pool[rng.choice(sorted(pool))]
                    passing.there[name] = upload(client, server, name, chosen.content)
                else:
                    gone = client.delete(f"/admin/adapters/{name}", headers=server.admin)
                    gone.raise_for_status()
                    passing.there[name] = None
                passing.changes += 1
                check_passer(client, name, passing)
            except httpx2.HTTPStatusError as error:
                passing.errors[f"change: {error.response.status_code}"] += 1
            except httpx2.HTTPError as error:
                passing.errors[f"change: {type(error).__name__}"] += 1
            due += 1.0 / options.pass_per_s
            time.sleep(max(0.0, due - time.monotonic()))


def check_passer(client: httpx2.Client, name: str, passing: Passing) -> None:
    """Ask for a name whose change was acknowledged; any HTTP replica may answer."""
    end = time.monotonic() + STALE_MAX_S
    expected = passing.there[name]
    while True:
        sent = time.monotonic()  # an answer counts from here: it may have waited for long
        answer = client.post("/predict", params={"adapter": name}, json=TEXT)
        version = answer.headers.get("X-Adapter-Version")
        as_told = answer.status_code == (404 if expected is None else 200)
        if as_told and (expected is None or version == expected):
            return
        if answer.status_code == 503:
            passing.errors[f"asked: {answer.json()['code']}"] += 1
            return
        if sent > end:
            passing.wrong.append(f"{name}: {answer.status_code} {version}, not {expected}")
            return


def lost_changes(server: ClusterServer, tenants: list[Tenant], passing: Passing) -> list[str]:
    """Names that are not on what was acknowledged last."""
    time.sleep(STALE_MAX_S)
    expected: dict[str, str | None] = {one.name: one.uploads[one.acknowledged] for one in tenants}
    expected |= passing.there
    with httpx2.Client(base_url=server.url, timeout=60, headers=server.admin) as client:
        found = {}
        for name in expected:
            answer = client.get(f"/admin/adapters/{name}")
            found[name] = answer.json()["version"] if answer.status_code == 200 else None
    return [
        f"{name} is on {found[name]}, not {version}"
        for name, version in expected.items()
        if found[name] != version
    ]


def staleness_s(server: ClusterServer, tenants: list[Tenant], number: int) -> float:
    """Seconds from a change's acknowledgement until no HTTP replica answers by the old version.

    Each connection of a proxy may reach any HTTP replica, so one that was not told is found by
    asking on.
    """
    tenant = tenants[number % len(tenants)]
    now = tenant.uploads[tenant.acknowledged]
    chosen = tenant.pool[next(one for one in sorted(tenant.pool) if one != now)]
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        upload(client, server, tenant.name, chosen.content)
    acknowledged = time.monotonic()
    tenant.uploads.append(chosen.digest)
    tenant.confirm(len(tenant.uploads) - 1)

    async def watch() -> float:
        last_old = acknowledged
        request = encoded(f"/predict?adapter={tenant.name}", TEXT)
        connections = [await Connection.open(server.port) for _ in range(4)]
        while time.monotonic() < acknowledged + STALE_MAX_S + 1:
            sent = time.monotonic()
            answers = await asyncio.gather(*(one.ask(request) for one in connections))
            if any(one.header("X-Adapter-Version") != chosen.digest for one in answers):
                last_old = sent
        for one in connections:
            one.abort()
        return last_old - acknowledged

    return asyncio.run(watch())


if __name__ == "__main__":
    sys.exit(main())
