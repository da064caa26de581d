"""`python -m loadtests.chaos --minutes 60 [--seed 1]`: see the package.

Clients of every kind, operators who change adapters, texts that are far too long and hostile
uploads, all at once, on a server that is broken in one way after another. No answer may be wrong,
no acknowledged change lost, nobody left hanging; after every break the service must be whole again
by itself, and at the end its processes, their memory and the engine's queues must be as at the
beginning. The order of the breaks is seeded; each kind comes once before any comes again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2

from loadtests.chaos import breaks, operators, strangers
from loadtests.chaos.windows import Windows
from loadtests.connection import Connection, Lost, encoded
from loadtests.mutants import Maker
from loadtests.servers import Server, start_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive, set_stage
from loadtests.traffic import Crowd, Log, Traffic
from loadtests.watch import Sample, look, trend

DEMO_DIR: Final = Path(__file__).parents[2] / "server" / "demo" / "adapters"
DISK: Final = "192m"
CONTENTS: Final = 8
NAMES: Final = 12
OPERATORS: Final = 2
HANG_S: Final = 8
SETUP_S: Final = 60
RECOVERY_S: Final = 180.0
CROWD: Final = Crowd(4, 2, 2, 1)
FINE: Final = frozenset({"ok", "left", "429 overloaded", "429 wait_too_long"})
GROWTH_PART, GROWTH_BYTES = 0.10, 64 << 20
SHOWN: Final = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--rounds", type=int, default=None, help="of all breaks, in place of the minutes"
    )
    parser.add_argument("--apart-s", type=float, default=8.0, help="of peace between two breaks")
    parser.add_argument("--only", action="append", default=[], help="a break; repeatable")
    parser.add_argument("--variants", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2, help="HTTP processes")
    parser.add_argument("--stall-s", type=float, default=3.0, help="that /health/live may take")
    parser.add_argument("--long-every-s", type=float, default=10.0, help="between long texts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("loadtests/results/chaos"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    log = options.results / "server.log"
    log.unlink(missing_ok=True)
    with _disk() as (disk, is_small):
        report, faults = asyncio.run(_run(disk, is_small, options))
    (options.results / "chaos.json").write_text(
        json.dumps({**report, "faults": faults}, indent=1) + "\n"
    )
    _print(report)
    for fault, count in Counter(faults).most_common(SHOWN):
        print(f"FAULT: {fault}" + (f" (x{count})" if count > 1 else ""), file=sys.stderr)
    if len(set(faults)) > SHOWN:
        print(f"FAULT: and {len(set(faults)) - SHOWN} more kinds", file=sys.stderr)
    return 1 if faults else 0


@contextmanager
def _disk() -> Iterator[tuple[Path, bool]]:
    """A folder for the server's data, on a small disk of its own where this user may mount one."""
    with tempfile.TemporaryDirectory(prefix="hira-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder]
        is_small = os.geteuid() == 0 and not subprocess.call(mount, stderr=subprocess.DEVNULL)
        try:
            yield Path(folder), is_small
        finally:
            if is_small:
                subprocess.run(["umount", "--lazy", folder], check=True)


async def _run(
    disk: Path, is_small: bool, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    arguments, setup_s = _arguments(options.processes)
    server = start_server(disk / "data", "fp32", options.results, *arguments)
    try:
        await asyncio.to_thread(server.wait_until_ready)
        return await _chaos(server, is_small, arguments, setup_s, options)
    finally:
        for one in _running:
            if one.process.poll() is None:
                one.process.kill()
        if server.process.poll() is None:
            server.stop()


_running: list[Server] = []  # servers that were started in place of a killed one


async def _chaos(
    server: Server,
    is_small: bool,
    arguments: tuple[str, ...],
    setup_s: float | None,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], list[str]]:
    port, admin = server.port, server.admin
    key = admin["Authorization"].removeprefix("Bearer ")
    stage = await asyncio.to_thread(set_stage, server.url, key, DEMO_DIR, options.variants, "fp32")
    tars = [
        archive(DEMO_DIR / ("hira-imdb", "hira-sst2")[one % 2], seed=500 + one)
        for one in range(CONTENTS + 1)
    ]
    *contents, victim = await operators.learn(port, admin, "chaos-learning", tars)
    windows, log, seen = Windows(), Log(), strangers.Seen()
    tolerance = SCORE_TOLERANCE["fp32"]

    def start_again() -> Server:
        data_dir, results = server.data_dir, options.results
        again = start_server(data_dir, "fp32", results, *arguments, port=port)
        _running.append(again)
        return again

    target = breaks.Target(
        server,
        start_again,
        is_small,
        victim,
        # Clients that leave, and those of long texts and operators, may have one each as well.
        sum(vars(CROWD).values()) + OPERATORS + 4,
        HANG_S,
        setup_s,
        random.Random(f"{options.seed}-breaks"),
        admin,
        tolerance,
        [],
    )
    staff = [
        operators.Operator(
            port,
            admin,
            [f"chaos-{number}-{one}" for one in range(NAMES // OPERATORS)],
            contents=contents,
            tolerance=tolerance,
            windows=windows,
            seed=f"{options.seed}-operator-{number}",
        )
        for number in range(OPERATORS)
    ]
    traffic = Traffic(port, stage, CROWD, options.seed, log)
    over = traffic.over
    maker = Maker(DEMO_DIR / "hira-sst2", options.seed)
    at_work = [
        asyncio.ensure_future(one)
        for one in (
            traffic.run(),
            *(one.run(over) for one in staff),
            strangers.send_long_texts(
                port, over, windows, seen, seed=options.seed, every_s=options.long_every_s
            ),
            strangers.send_hostile_uploads(port, over, windows, seen, admin=admin, maker=maker),
            strangers.probe(port, over, windows, seen, stall_s=options.stall_s),
        )
    ]
    before = await asyncio.to_thread(look, server)
    memory: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    began = time.monotonic()
    await _break_things(target, windows, options, began, memory)
    over.set()
    await asyncio.gather(*at_work)
    for one in staff:
        await one.check()
    target.faults += await _settled(target)
    after = await asyncio.to_thread(look, target.server)
    stopped = await asyncio.to_thread(target.server.stop)
    if stopped != 0:
        target.faults.append(f"the server ended with status {stopped}")
    return _judge(
        windows,
        log,
        staff=staff,
        seen=seen,
        target=target,
        before=before,
        after=after,
        memory=memory,
        seconds=time.monotonic() - began,
    )


async def _break_things(
    target: breaks.Target,
    windows: Windows,
    options: argparse.Namespace,
    began: float,
    memory: defaultdict[str, list[tuple[float, float]]],
) -> None:
    rng = random.Random(f"{options.seed}-order")
    kinds = [one for one in breaks.BREAKS if not options.only or one.__name__ in options.only]
    if not kinds:
        raise SystemExit(f"no such break; there are {', '.join(b.__name__ for b in breaks.BREAKS)}")
    waiting: list[Any] = []
    rounds = 0
    while (
        time.monotonic() - began < options.minutes * 60
        if options.rounds is None
        else waiting or rounds < options.rounds
    ):
        await asyncio.sleep(min(options.apart_s, options.minutes * 60))
        for role, kinds_of in (await asyncio.to_thread(look, target.server)).items():
            memory[role].append((time.monotonic() - began, kinds_of["resident_bytes"]))
        if not waiting:
            waiting = rng.sample(kinds, len(kinds))
            rounds += 1
        act = waiting.pop()
        with windows.during(act.__name__) as window:
            await act(target)
            harmed_s = window.seconds
            whole = await _whole_again(target)
        if not whole:
            target.faults.append(f"{act.__name__}: not whole again within {RECOVERY_S:g} s")
        passed = time.monotonic() - began
        print(
            f"{passed:7.0f} s  {act.__name__:<32} harm {harmed_s:6.1f} s, whole again "
            f"{window.seconds - harmed_s:5.1f} s later; faults {len(target.faults)}",
            flush=True,
        )
        if target.server.process.poll() is not None:
            target.faults.append(f"{act.__name__}: the server ended")
            return


async def _whole_again(target: breaks.Target) -> bool:
    """Ready, and a text is classified and one is generated, ten times in a row."""
    until, right = time.monotonic() + RECOVERY_S, 0
    asked = (
        encoded("/health/ready", method="GET"),
        encoded("/predict?adapter=hira-imdb", {"inputs": TEXTS[0]}),
        encoded(
            "/generate?adapter=hira-wiki",
            {"inputs": "The king", "parameters": {"max_new_tokens": 1}},
        ),
    )
    while time.monotonic() < until and right < 10:
        try:
            async with asyncio.timeout(30.0):
                connection = await Connection.open(target.port)
                statuses = [(await connection.ask(raw)).status for raw in asked]
                connection.abort()
            right = right + 1 if statuses == [200, 200, 200] else 0
        except (Lost, OSError, TimeoutError):
            right = 0
        await asyncio.sleep(0.05 if right else 0.2)
    return right >= 10


async def _settled(target: breaks.Target) -> list[str]:
    """Nobody asks any more: the engine has nothing to do, and nothing counts as admitted."""
    until, busy = time.monotonic() + 20.0, ["?"]
    while busy and time.monotonic() < until:
        await asyncio.sleep(1.0)
        try:
            text = (
                await asyncio.to_thread(httpx2.get, f"{target.server.url}/metrics", timeout=10)
            ).text
        except httpx2.HTTPError as error:
            busy = [f"no metrics: {error}"]
            continue
        busy = [
            line
            for line in text.splitlines()
            if line.startswith(("hira_queue_depth{", "hira_admitted{"))
            and float(line.rsplit(" ", 1)[1]) != 0
        ]
    return [f"not idle 20 s after the last request: {line}" for line in busy]


def _judge(
    windows: Windows,
    log: Log,
    *,
    staff: list[operators.Operator],
    seen: strangers.Seen,
    target: breaks.Target,
    before: Sample,
    after: Sample,
    memory: defaultdict[str, list[tuple[float, float]]],
    seconds: float,
) -> tuple[dict[str, Any], list[str]]:
    books = [one.books for one in staff]
    wrong = [*log.wrong, *(line for one in books for line in one.wrong)]
    lost = [line for one in books for line in one.lost]
    hung = [*log.hung, *(line for one in books for line in one.hung)]
    excused: Counter[str] = Counter()
    failed = [line for one in books for line in one.failed]
    for one in log.ended:
        if one.outcome in FINE or one.outcome in {"wrong", "hung"}:
            continue
        excuse = windows.cover(one.began, one.ended)
        if excuse is None:
            failed.append(f"{one.kind}: {one.outcome}, in no break")
        else:
            excused[excuse] += 1
    faults = [f"wrong: {one}" for one in wrong] + [f"lost: {one}" for one in lost]
    faults += [f"hung: {one}" for one in hung] + [f"failed: {one}" for one in failed]
    faults += seen.faults + target.faults
    if before.keys() != after.keys():
        faults.append(f"processes {sorted(after)} in place of {sorted(before)}")
    right = sum(count for (_, outcome), count in log.counts.items() if outcome == "ok")
    if not right or not sum(one.done["registered"] for one in books):
        faults.append("nothing was asked, or nothing was registered")
    resident = {}
    for role, samples in memory.items():
        late = samples[len(samples) // 4 :]
        first, last = late[0][1], after.get(role, {}).get("resident_bytes", 0)
        resident[role] = {"warm_mib": round(first / 2**20, 1), "last_mib": round(last / 2**20, 1)}
        if len(late) >= 10:
            line = trend([at for at, _ in late], [value for _, value in late])
            resident[role]["mib_per_minute"] = round(line.per_minute / 2**20, 3)
            grown = line.last - line.first
            if not line.is_noise and grown > max(GROWTH_PART * line.first, GROWTH_BYTES):
                faults.append(f"{role} grows by {grown / 2**20:.0f} MiB")
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for window in windows.all:
        by_kind[window.kind].append(window.seconds)
    report = {
        "seconds": round(seconds, 1),
        "requests": log.total(),
        "right": right,
        "wrong": len(wrong),
        "lost": len(lost),
        "hung": len(hung),
        "failed_without_excuse": len(failed),
        "told_during_breaks": dict(excused),
        "operators": dict(sum((one.done for one in books), Counter[str]())),
        "strangers": dict(seen.outcomes),
        "probes": seen.probes,
        "slowest_probe_s": round(seen.slowest_s, 2),
        "breaks": {
            kind: {"times": len(took), "longest_s": round(max(took), 1)}
            for kind, took in sorted(by_kind.items())
        },
        "resident": resident,
        "processes": {"before": sorted(before), "after": sorted(after)},
    }
    return report, faults


def _arguments(processes: int) -> tuple[tuple[str, ...], float | None]:
    """Settings for a short trial of patience; older servers do not bound a worker's set-up."""
    arguments = [f"--api-processes={processes}", f"--hang-s={HANG_S}", "--max-timeout-s=60"]
    arguments += ["--slots=12", "--timeout-s=25", "--drain-s=10"]
    known = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    ).stdout
    if "--max-setup-s" in known:
        return (*arguments, f"--max-setup-s={SETUP_S}"), SETUP_S
    return tuple(arguments), None


def _print(report: dict[str, Any]) -> None:
    print(
        f"\n{report['seconds']:.0f} s: {report['requests']} requests, {report['right']} right, "
        f"wrong {report['wrong']}, lost {report['lost']}, hung {report['hung']}, failed outside of "
        f"a break {report['failed_without_excuse']}; slowest sign of life "
        f"{report['slowest_probe_s']} s of {report['probes']}"
    )
    print(f"operators: {report['operators']}")
    print(f"{'break':<34}{'times':>6}{'longest s':>11}{'clients told':>14}")
    for kind, one in report["breaks"].items():
        told = report["told_during_breaks"].get(kind, 0)
        print(f"{kind:<34}{one['times']:>6}{one['longest_s']:>11}{told:>14}")
    for role, one in report["resident"].items():
        print(f"{role:<10} {one}")


if __name__ == "__main__":
    sys.exit(main())
