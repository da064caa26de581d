"""Kills parts of a cluster under traffic, one after another, and says how long each was felt.

`python -m loadtests.cluster_kills --away-s 60`

In turn: an engine replica, the HTTP proxy with the process that keeps it, an HTTP replica,
PostgreSQL and the object store; the first three by SIGKILL, the others away for ``--away-s``. With
`--part node`, for which there are two nodes on this machine: the one that has an engine replica and
nothing else, by SIGKILL to the process that keeps it; those that it keeps end with it.
Meanwhile clients ask adapters whose answers are known, generate, and an operator registers. No
answer may be wrong, no call may hang, and each part must be back by itself. Told is how long after
the kill the last call that it cut off had its error, or was asked again of another replica, which
the log of the HTTP replica says; back is when all is as before. A call that was under way at the
kill and was answered all the same must not have been held up for long: its time has a bound too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx2
import psutil

from loadtests.churn import Tenant, base_and_sources, fault_in, prepare
from loadtests.clusters import (
    ENGINE,
    HTTP,
    NODE,
    PROXY,
    PROXY_KEEPER,
    ClusterServer,
    running_cluster,
)
from loadtests.connection import Connection, Lost, encoded
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive
from loadtests.verdict import verdict

HANG_S: Final = 60.0  # a call that takes longer hangs
TOLD_S: Final = 2.0  # within which whoever was cut off must know
# From the kill to the answer of a call that was under way. Wide, for the replicas that are left are
# slow while the new one starts (10.2 s on two busy processors); a stall is longer.
HELD_S: Final = 20.0
BACK_S: Final = 180.0
CALM_S: Final = 8.0  # before and after each kill
OPERATOR_EVERY_S: Final = 1.5
LOST: Final = "lost its replica"
LOGGED_AT: Final = re.compile(r'"time": *"([^"]+)"')
PARTS: Final = ("engine", "proxy", "http", "postgres", "store")
KILLED: Final = {"engine", "proxy", "http", "node"}
# The head has room for the HTTP replica, an engine replica, and that of the node that goes.
NODE_CPUS: Final = (4, 1)


@dataclass(frozen=True)
class Call:
    """One call of a client.

    Args:
        kind: ``predict``, ``generate`` or ``register``.
        began, ended: Monotonic.
        outcome: ``ok``, or what it got.
    """

    kind: str
    began: float
    ended: float
    outcome: str


@dataclass
class Seen:
    """What clients saw.

    Args:
        calls: All that have ended.
        wrong: Answers that should not have been.
        running: When each call began that has not ended.
    """

    calls: list[Call] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    running: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def call(self, kind: str) -> Iterator[list[str]]:
        """Note what becomes of a call: the block appends it."""
        began = time.monotonic()
        number = hash((kind, began, random.random()))
        self.running[number] = began
        outcome: list[str] = []
        try:
            yield outcome
        finally:
            del self.running[number]
            self.calls.append(Call(kind, began, time.monotonic(), (outcome or ["left"])[0]))


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="hira-cluster-kills-") as name:
        folder = Path(name)
        arguments, sources = base_and_sources(folder, options)
        with running_cluster(
            folder / "cluster",
            *arguments,
            "--slots=4",
            "--host-bytes=0",
            "--deterministic",  # so that a generated text has one right form
            *("--log-level=info", "--log-format=json"),  # with times
            replicas=options.replicas,
            http_replicas=options.http_replicas,
            with_objects="store" in options.part,
            node_cpus=NODE_CPUS if options.part == ["node"] else (),
        ) as server:
            tenants = prepare(server, sources, options)
            rows, wrong = asyncio.run(break_parts(server, tenants, sources, options))
    faults = [f"wrong: {line}" for line in wrong[:10]] + [
        f"{row['part']}: {fault}" for row in rows for fault in row.pop("faults")
    ]
    for row in rows:
        print(json.dumps(row))
    return verdict(faults, {"rows": rows, "faults": faults}, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.cluster_kills", description=__doc__)
    parser.add_argument(
        "--part", action="append", choices=(*PARTS, "node"), default=[], help="repeatable"
    )
    parser.add_argument("--away-s", type=float, default=60.0, help="of PostgreSQL and of the store")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--http-replicas", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--versions", type=int, default=2, help="in the pool of each adapter")
    parser.add_argument("--clients", type=int, default=6, help="connections that ask")
    parser.add_argument("--generators", type=int, default=2, help="connections that generate")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.part = options.part or list(PARTS)
    if "node" in options.part and options.part != ["node"]:
        parser.error("--part node needs a cluster of its own: give no other part")
    options.base, options.dtype, options.sources = "tiny", "fp32", None
    options.bound_s = 2.0 if options.http_replicas > 1 else 0.0  # until all know a version
    return options


async def break_parts(
    server: ClusterServer, tenants: list[Tenant], sources: list[Path], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Break each part in turn under traffic; a row of figures for each, and all wrong answers."""
    seen, over = Seen(), asyncio.Event()
    at_work = [
        *(
            ask(server, tenants, seen, over, seed=f"{options.seed}-{one}")
            for one in range(options.clients)
        ),
        *(generate(server, seen, over) for _ in range(options.generators)),
        operate(server, sources, seen, over),
    ]
    tasks = [asyncio.ensure_future(one) for one in at_work]
    rows = []
    for part in options.part:
        await asyncio.sleep(CALM_S)
        row = await BREAKS[part](server, seen, options)
        await asyncio.sleep(CALM_S)
        killed = time.time() - (time.monotonic() - row.killed)
        again = asked_again_s(server.log.read_text(errors="replace"), killed)
        rows.append(judged(part, row, seen, again))
        print(f"{part}: {rows[-1]}", flush=True)
        seen.calls.clear()
    over.set()
    done, left = await asyncio.wait(tasks, timeout=2 * HANG_S)
    for one in done:
        one.result()
    if left:
        seen.wrong.append(f"{len(left)} clients have not ended")
    return rows, seen.wrong


async def ask(
    server: ClusterServer, tenants: list[Tenant], seen: Seen, over: asyncio.Event, *, seed: str
) -> None:
    """One client: random adapters, on one connection, and a new one when it breaks."""
    rng = random.Random(seed)
    tolerance = SCORE_TOLERANCE["fp32"]
    connection: Connection | None = None
    while not over.is_set():
        tenant, text = rng.choice(tenants), rng.choice(TEXTS)
        request = encoded(f"/predict?adapter={tenant.name}", {"inputs": text})
        with seen.call("predict") as outcome:
            try:
                if connection is None or not connection.usable:
                    connection = await Connection.open(server.port)
                async with asyncio.timeout(HANG_S):
                    reply = await connection.ask(request)
            except (Lost, OSError) as error:
                outcome.append(type(error).__name__)
            except TimeoutError:
                outcome.append("hung")
                connection = None
            else:
                outcome.append("ok" if reply.status == 200 else reply.code())
                if reply.status == 200:
                    fault = fault_in(reply, tenant, [text], 0, tolerance)
                    if fault is not None:
                        seen.wrong.append(f"{tenant.name}: {fault}")
        if outcome != ["ok"]:
            await asyncio.sleep(0.2)
    if connection is not None:
        connection.abort()


async def generate(server: ClusterServer, seen: Seen, over: asyncio.Event) -> None:
    """One client that generates with the base, over and over."""
    body = {"inputs": "A fine film", "parameters": {"max_new_tokens": 48}}
    async with httpx2.AsyncClient(base_url=server.url, timeout=HANG_S) as client:
        expected: str | None = None
        while not over.is_set():
            with seen.call("generate") as outcome:
                try:
                    answer = await client.post("/generate", json=body)
                except httpx2.TimeoutException:
                    outcome.append("hung")
                except httpx2.TransportError as error:
                    outcome.append(type(error).__name__)
                else:
                    outcome.append(outcome_of(answer))
                    if answer.status_code == 200:
                        text = answer.json()["generated_text"]
                        expected = expected or text
                        if text != expected:
                            seen.wrong.append("a generated text is another than before")
            if outcome != ["ok"]:
                await asyncio.sleep(0.2)


async def operate(
    server: ClusterServer, sources: list[Path], seen: Seen, over: asyncio.Event
) -> None:
    """An operator who registers new contents, one after another, and asks for each."""
    async with httpx2.AsyncClient(base_url=server.url, timeout=HANG_S) as client:
        for number in range(100_000):
            if over.is_set():
                return
            name = f"made-{number % 6}"
            content = archive(sources[number % len(sources)], 50_000 + number)
            with seen.call("register") as outcome:
                try:
                    answer = await client.post(
                        "/admin/adapters",
                        data={"name": name, "replace": "true"},
                        files={"file": (f"{name}.tar", content)},
                        headers=server.admin,
                    )
                except httpx2.TimeoutException:
                    outcome.append("hung")
                except httpx2.TransportError as error:
                    outcome.append(type(error).__name__)
                else:
                    outcome.append(outcome_of(answer))
                    if answer.status_code == 503 and "Retry-After" not in answer.headers:
                        seen.wrong.append("a 503 without Retry-After")
            await asyncio.sleep(OPERATOR_EVERY_S)


def outcome_of(answer: httpx2.Response) -> str:
    if answer.status_code in {200, 201}:
        return "ok"
    try:
        return f"{answer.status_code} {answer.json()['code']}"
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)


@dataclass(frozen=True)
class Broken:
    """A part that was broken.

    Args:
        killed: When, monotonic.
        mended: When it was started again by hand; None where that is the cluster's own affair.
        back_s: Until all was as before, from then on.
    """

    killed: float
    mended: float | None
    back_s: float


def asked_again_s(log: str, killed: float) -> list[float]:
    """How long after a kill it was known of requests that they had lost their replica.

    Args:
        log: Of the HTTP replicas, JSON lines.
        killed: When, in seconds since the epoch.
    """
    said = [LOGGED_AT.search(line) for line in log.splitlines() if LOST in line]
    times = [datetime.fromisoformat(one[1]).timestamp() - killed for one in said if one]
    return [one for one in times if one >= 0]


async def break_engine(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    return await with_an_engine(server, server.actors(ENGINE)[0])


async def break_node(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    node = server.actors(NODE)[-1]
    there = " ".join(" ".join(one.cmdline()) for one in node.children(recursive=True))
    if ENGINE not in there or HTTP in there or PROXY_KEEPER in there:
        raise SystemExit(f"Ray has placed the replicas otherwise: {there}")
    return await with_an_engine(server, node)


async def with_an_engine(server: ClusterServer, killed: psutil.Process) -> Broken:
    """Kill a process, and with it an engine replica, and wait until as many as before are there,
    one of them new, and all have spoken."""
    before = {one.pid for one in server.actors(ENGINE)}
    killed.kill()
    at = time.monotonic()

    def is_back() -> bool:
        now = {one.pid for one in server.actors(ENGINE)}
        if len(now) < len(before) or now == before:
            return False
        text = httpx2.get(f"{server.url}/metrics", timeout=5).text
        return text.count("hira_replica_queue_depth{") // 2 >= len(before)

    await asyncio.sleep(1.0)
    await until(is_back)
    return Broken(at, None, time.monotonic() - at)


async def break_proxy(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    for one in (*server.actors(PROXY_KEEPER), *server.actors(PROXY)):
        one.kill()
    killed = time.monotonic()
    await until(lambda: bool(server.actors(PROXY)) and server.is_ready())
    return Broken(killed, None, time.monotonic() - killed)


async def break_http(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    before = {one.pid for one in server.actors(HTTP)}
    server.actors(HTTP)[0].kill()
    killed = time.monotonic()

    def is_back() -> bool:
        now = {one.pid for one in server.actors(HTTP)}
        return len(now) >= len(before) and now != before and server.is_ready()

    await until(is_back)
    return Broken(killed, None, time.monotonic() - killed)


async def break_postgres(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    server.database.stop()
    return await away(server.database.start, seen, options)


async def break_store(server: ClusterServer, seen: Seen, options: argparse.Namespace) -> Broken:
    assert server.objects is not None
    server.objects.kill()
    return await away(server.objects.start, seen, options)


async def away(start: Callable[[], None], seen: Seen, options: argparse.Namespace) -> Broken:
    killed = time.monotonic()
    await asyncio.sleep(options.away_s)
    await asyncio.to_thread(start)
    mended = time.monotonic()

    def takes_changes() -> bool:
        return any(
            one.kind == "register" and one.outcome == "ok" and one.began > mended
            for one in seen.calls
        )

    await until(takes_changes)
    return Broken(killed, mended, time.monotonic() - mended)


BREAKS: Final = {
    "engine": break_engine,
    "node": break_node,
    "proxy": break_proxy,
    "http": break_http,
    "postgres": break_postgres,
    "store": break_store,
}


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BACK_S
    while time.monotonic() < end:
        try:
            if await asyncio.to_thread(condition):
                return
        except httpx2.TransportError:
            pass  # not there yet
        await asyncio.sleep(0.1)


def judged(part: str, broken: Broken, seen: Seen, again: Sequence[float] = ()) -> dict[str, Any]:
    """The figures of one part, with its ``faults``.

    Args:
        again: When it was known of requests that they must be asked again, after the kill.
    """
    harmed = [one for one in seen.calls if one.outcome != "ok"]
    cut = [one.ended - broken.killed for one in harmed if one.began <= broken.killed < one.ended]
    told_s = max([*cut, *again], default=0.0)
    held_s = max(
        (
            one.ended - broken.killed
            for one in seen.calls
            if one.kind != "register" and one.outcome == "ok"
            if one.began <= broken.killed < one.ended
        ),
        default=0.0,
    )
    until_s = broken.mended or broken.killed
    answers = [one for one in seen.calls if one.kind != "register" and one.ended > broken.killed]
    ended = time.monotonic()
    hung = sum(one.outcome == "hung" for one in seen.calls) + sum(
        ended - began > HANG_S for began in seen.running.values()
    )
    faults = [f"{hung} calls hung"] if hung else []
    if part in KILLED and told_s > TOLD_S:
        faults.append(f"a call that was cut off was told after {told_s:.1f} s")
    if held_s > HELD_S:
        faults.append(f"a call that was under way was answered only after {held_s:.1f} s")
    if broken.back_s >= BACK_S:
        faults.append(f"not as before within {BACK_S:g} s")
    failed = [one for one in answers if one.outcome != "ok"]
    if part in {"postgres", "store"}:
        allowed = {"503 store_unavailable"} if part == "store" else set[str]()
        others = Counter(one.outcome for one in failed if one.outcome not in allowed)
        if others:
            faults.append(f"answers failed: {dict(others)}")
        if not any(one.outcome == "ok" and one.ended < until_s for one in answers):
            faults.append("nothing was answered meanwhile")
    return {
        "part": part,
        "answers_ok": sum(one.outcome == "ok" for one in answers),
        "outcomes": dict(Counter(f"{one.kind} {one.outcome}" for one in harmed)),
        "hung": hung,
        "wrong": len(seen.wrong),
        "cut_off": max(len(cut), len(again)),
        "told_s": round(told_s, 2),
        "held_s": round(held_s, 2),
        "longest_call_s": round(max((one.ended - one.began for one in answers), default=0.0), 2),
        "last_harm_s": round(max((one.ended - until_s for one in harmed), default=0.0), 2),
        "back_s": round(broken.back_s, 2),
        "faults": faults,
    }


if __name__ == "__main__":
    sys.exit(main())
