"""Kills the inference worker under traffic, over and over: `python -m loadtests.kills --count 20`.

Whoever has a request under way must be told within two seconds, nobody may hang, and no answer may
be wrong, before a kill or after it. How long it takes until the server is ready again is reported
apart from the pause that it makes on purpose when workers die one after another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.connection import Connection, Lost, encoded
from loadtests.servers import Server, ready_server
from loadtests.stage import set_stage
from loadtests.traffic import Crowd, Log, Traffic, percentile

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
TOLD_S = 2.0
READY_S = 180.0
LOOK_S = 0.05
NEW_TOKENS = 48  # so that generations are under way when the worker dies
KNOWN = frozenset({"503 worker_lost", "503 starting", "event worker_lost"})
PAUSE = re.compile(r"a new one starts in ([0-9.]+) s")


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    number: int
    under_way: int  # requests when it was killed
    told: int  # of those, answered with an error that says so
    answered: int  # of those, answered: the answer was on its way already
    told_p50_s: float
    told_max_s: float
    not_ready_s: float  # until readiness said 503
    ready_s: float  # until readiness said 200 again
    pause_s: float  # of those, waited on purpose


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--apart-s", type=float, default=3.0, help="from ready to the next kill")
    parser.add_argument("--variants", type=int, default=10)
    parser.add_argument("--pinned", type=int, default=3, help="adapters that must come back pinned")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("loadtests/results/kills.json"))
    options = parser.parse_args()
    results = Path("loadtests/results/kills")
    with (
        tempfile.TemporaryDirectory(prefix="hira-kills-") as folder,
        ready_server(Path(folder), options.dtype, results) as server,
    ):
        report, faults = asyncio.run(_run(server, options))
        stopped = server.stop()
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**report, "faults": faults}, indent=1) + "\n")
    _print(report)
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


async def _run(server: Server, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    key = server.admin["Authorization"].removeprefix("Bearer ")
    stage = await asyncio.to_thread(
        set_stage,
        server.url,
        key,
        DEMO_DIR,
        options.variants,
        options.dtype,
        new_tokens=NEW_TOKENS,
    )
    pinned = [one.name for one in stage.classifiers[: options.pinned]]
    for name in pinned:
        await _call(server, "PATCH", f"/admin/adapters/{name}", {"pinned": True})
    log = Log()
    traffic = Traffic(server.port, stage, Crowd(), options.seed, log)
    running = asyncio.create_task(traffic.run())
    kills: list[Kill] = []
    faults: list[str] = []
    for number in range(options.count):
        await asyncio.sleep(options.apart_s)
        kills.append(await _kill(server, number, log))
        lost = await _not_pinned(server, pinned)
        if lost:
            faults.append(f"kill {number}: not on the device again after 10 s: {lost}")
        print(f"kill {number}: {kills[-1]}", flush=True)
    await asyncio.sleep(options.apart_s)
    traffic.over.set()
    await running
    report = {
        "kills": [asdict(one) for one in kills],
        "requests": log.total(),
        "right": sum(count for (_, outcome), count in log.counts.items() if outcome == "ok"),
        "wrong": len(log.wrong),
        "hung": len(log.hung),
        "errors": log.errors(),
        "told_max_s": max(one.told_max_s for one in kills),
        "ready_p50_s": percentile([one.ready_s - one.pause_s for one in kills], 0.5),
        "ready_max_s": max(one.ready_s - one.pause_s for one in kills),
    }
    return report, faults + _faults(kills, log)


async def _kill(server: Server, number: int, log: Log) -> Kill:
    """Kill the worker when every kind of request is under way, and wait until it is back."""
    pid, told_before = server.worker_pid(), server.log.read_text(errors="replace").count("\n")
    wanted = {"predict", "generate", "stream"}
    while pid is None or not wanted <= {kind for kind, _ in log.running.values()}:
        await asyncio.sleep(0.001)
        pid = server.worker_pid()
    # Asked long enough ago to be with the worker, and for certain under way now.
    under_way = dict(log.running)
    mark = len(log.ended)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    not_ready_s = await _until_ready(server, killed, ready=False)
    ready_s = await _until_ready(server, killed, ready=True)
    ended = [
        one
        for one in log.ended[mark:]
        if any(one.began == began for _, began in under_way.values())
    ]
    told = [one.ended - killed for one in ended if one.outcome in KNOWN]
    lines = server.log.read_text(errors="replace").splitlines()[told_before:]
    pauses = [float(found[1]) for line in lines if (found := PAUSE.search(line))]
    return Kill(
        number,
        len(under_way),
        len(told),
        sum(one.outcome in {"ok", "left"} for one in ended),
        round(percentile(told, 0.5), 3) if told else 0.0,
        round(max((one.ended - killed for one in ended), default=0.0), 3),
        round(not_ready_s, 3),
        round(ready_s, 3),
        sum(pauses),
    )


async def _until_ready(server: Server, since: float, *, ready: bool) -> float:
    wanted = 200 if ready else 503
    while time.monotonic() - since < READY_S:
        if await _status(server) == wanted:
            return time.monotonic() - since
        await asyncio.sleep(LOOK_S)
    raise SystemExit(f"readiness was not {wanted} within {READY_S:g} s (see {server.log})")


async def _status(server: Server) -> int | None:
    try:
        connection = await Connection.open(server.port)
    except (OSError, TimeoutError):
        return None
    try:
        async with asyncio.timeout(5.0):
            return (await connection.ask(encoded("/health/ready", method="GET"))).status
    except (Lost, TimeoutError):
        return None
    finally:
        connection.abort()


async def _call(server: Server, method: str, path: str, body: Any = None) -> Any:
    connection = await Connection.open(server.port)
    raw = encoded(path, body, method=method, headers=server.admin)
    reply = await connection.ask(raw)
    connection.abort()
    if reply.status != 200:
        raise SystemExit(f"{method} {path}: {reply.code()}")
    return reply.json()


async def _not_pinned(server: Server, names: list[str]) -> list[str]:
    """Pinned adapters that are not on the device some seconds after the worker came back."""
    left = list(names)
    for _ in range(20):
        left = [
            name
            for name in left
            if (await _call(server, "GET", f"/admin/adapters/{name}"))["residency"] != "device"
        ]
        if not left:
            break
        await asyncio.sleep(0.5)
    return left


def _faults(kills: list[Kill], log: Log) -> list[str]:
    found = [f"wrong: {one}" for one in log.wrong[:10]]
    found += [f"hung: {one}" for one in log.hung[:10]]
    # Those under way are told at once; who asks a dead server is told too; nothing else may fail.
    found += [
        f"error: {kind}: {outcome} x{count}"
        for (kind, outcome), count in log.counts.items()
        if outcome not in KNOWN | {"ok", "left", "wrong", "hung"}
    ]
    for one in kills:
        if one.told_max_s > TOLD_S:
            found.append(f"kill {one.number}: a client was told after {one.told_max_s:.1f} s")
        if one.told + one.answered != one.under_way:
            found.append(f"kill {one.number}: {one}")
    if not any(one.told for one in kills):
        found.append("no request was under way at any kill")
    return found


def _print(report: dict[str, Any]) -> None:
    print(
        f"\n{'kill':>4}{'under way':>10}{'told':>6}{'answered':>9}{'told p50 s':>11}"
        f"{'max s':>7}{'503 s':>7}{'ready s':>9}{'pause s':>9}"
    )
    for one in report["kills"]:
        print(
            f"{one['number']:>4}{one['under_way']:>10}{one['told']:>6}{one['answered']:>9}"
            f"{one['told_p50_s']:>11.3f}{one['told_max_s']:>7.3f}{one['not_ready_s']:>7.2f}"
            f"{one['ready_s']:>9.2f}{one['pause_s']:>9.1f}"
        )
    print(
        f"\n{report['requests']} requests, {report['right']} right, {report['wrong']} wrong, "
        f"{report['hung']} hung; told within {report['told_max_s']:.2f} s; ready again after "
        f"{report['ready_p50_s']:.1f} s (median, without pauses), at most "
        f"{report['ready_max_s']:.1f} s"
    )
    for name, count in report["errors"].items():
        print(f"  {name}: {count}")


if __name__ == "__main__":
    sys.exit(main())
