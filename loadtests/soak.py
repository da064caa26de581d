"""Runs mixed traffic with churn for long and looks for what grows: `python -m loadtests.soak`.

`python -m loadtests.soak --minutes 30`

Clients classify, generate, stream and leave in mid-stream, an operator registers, replaces and
removes adapters, all the while. No error, no wrong answer; resident memory of every process must
not rise by more than noise, and descriptors and threads must stay as they were. Writes JSON and a
page with the curves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.connection import Connection, Lost, Reply, encoded
from loadtests.curves import page
from loadtests.servers import Server, ready_server
from loadtests.stage import TEXTS, archive, set_stage
from loadtests.traffic import HUNG_S, Crowd, Log, Traffic
from loadtests.verdict import verdict
from loadtests.watch import Watch, trend

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
WARM_PART, WARM_MAX_S = 0.25, 300.0  # caches, heaps and adapters on the device fill first
GROWTH_PART = 0.02  # of resident memory over the whole run: less is noise by any measure
# A connection of a client that leaves, or of the registry, comes and goes.
SPREAD = {"descriptors": 24, "threads": 2}
CHURN_S = 0.5
CONTENTS = 8  # different uploads that take turns
BOUNDARY = "hira-soak-boundary"


class Operator:
    """Registers, replaces, asks and removes adapters of its own, one after the other."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.rng = random.Random(f"{seed}-operator")
        sources = [DEMO_DIR / "hira-imdb", DEMO_DIR / "hira-sst2"]
        self.contents = [archive(sources[one % 2], seed=1000 + one) for one in range(CONTENTS)]
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, over: asyncio.Event) -> None:
        connection = await Connection.open(self.server.port)
        number = 0
        while not over.is_set():
            number += 1
            try:
                if not connection.usable:
                    connection = await Connection.open(self.server.port)
                async with asyncio.timeout(HUNG_S):
                    await self._turn(connection, f"soak-{number % 7}")
            except (Lost, OSError, TimeoutError) as error:
                self.faults.append(f"operator: {type(error).__name__} {error}")
                connection.abort()
            await asyncio.sleep(CHURN_S)
        connection.abort()

    async def _turn(self, connection: Connection, name: str) -> None:
        """A name's life: registered, asked, replaced, asked, removed, refused."""
        first, second = self.rng.sample(self.contents, 2)
        for content, what in ((first, "registered"), (second, "replaced")):
            reply = await connection.ask(self._upload(name, content))
            if not self._expect(reply, {201}, what):
                return
            version = reply.json()["version"]
            asked = encoded(f"/predict?adapter={name}", {"inputs": TEXTS[0]})
            reply = await connection.ask(asked)
            if not self._expect(reply, {200}, "asked"):
                return
            if reply.header("X-Adapter-Version") != version:
                self.faults.append(
                    f"operator: {name} answered by {reply.header('X-Adapter-Version')}, "
                    f"registered {version}"
                )
        path = f"/admin/adapters/{name}"
        removal = encoded(path, method="DELETE", headers=self.server.admin)
        self._expect(await connection.ask(removal), {204}, "removed")
        self._expect(await connection.ask(asked), {404}, "refused")

    def _expect(self, reply: Reply, wanted: set[int], what: str) -> bool:
        if reply.status in wanted:
            self.done[what] += 1
            return True
        self.faults.append(f"operator: not {what}: {reply.code()} {reply.body[:200]!r}")
        return False

    def _upload(self, name: str, content: bytes) -> bytes:
        part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
        fields = f'{part}"name"\r\n\r\n{name}\r\n{part}"replace"\r\n\r\ntrue\r\n'
        opening = f'{part}"file"; filename="{name}.tar"\r\nContent-Type: application/x-tar\r\n\r\n'
        body = fields.encode() + opening.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return encoded("/admin/adapters", body, headers={**self.server.admin, **kind})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=2.0, help="between samples")
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="HTTP processes")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("loadtests/results/soak"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    arguments = (f"--api-processes={options.processes}",)
    with (
        tempfile.TemporaryDirectory(prefix="hira-soak-") as folder,
        ready_server(Path(folder), options.dtype, options.results, *arguments) as server,
    ):
        key = server.admin["Authorization"].removeprefix("Bearer ")
        stage = set_stage(server.url, key, DEMO_DIR, options.variants, options.dtype)
        log = Log(keep=False)
        operator = Operator(server, options.seed)
        traffic = Traffic(server.port, stage, Crowd(4, 2, 2, 1), options.seed, log)
        with Watch(server, options.every_s) as watch:
            asyncio.run(_run(traffic, operator, options.minutes * 60))
        stopped = server.stop()
    report, faults = judge(watch, log, operator)
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    (options.results / "soak.json").write_text(
        json.dumps({**report, "faults": faults}, indent=1) + "\n"
    )
    title = f"Soak, {options.minutes:g} minutes, {time.strftime('%Y-%m-%d')}"
    (options.results / "soak.html").write_text(page(title, watch, report, faults))
    _print(report)
    return verdict(faults)


async def _run(traffic: Traffic, operator: Operator, seconds: float) -> None:
    running = asyncio.gather(traffic.run(), operator.run(traffic.over))
    said, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        await asyncio.sleep(min(1.0, seconds - passed))
        if passed // 60 > said:
            said = int(passed // 60)
            log = traffic.log
            print(
                f"{said} min: {log.total()} requests, {log.errors()}, {dict(operator.done)}",
                flush=True,
            )
    traffic.over.set()
    await running


def judge(watch: Watch, log: Log, operator: Operator) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what broke a pass mark."""
    seconds = watch.at[-1]
    warm_s = min(WARM_PART * seconds, WARM_MAX_S)
    faults = [f"wrong: {one}" for one in log.wrong[:10]]
    faults += [f"hung: {one}" for one in log.hung[:10]]
    faults += [f"error: {name} x{count}" for name, count in log.errors().items()]
    faults += operator.faults[:10]
    right = sum(count for (_, outcome), count in log.counts.items() if outcome == "ok")
    if not right or not operator.done["removed"]:
        faults.append("nothing was asked, or nothing was turned over")
    processes: dict[str, Any] = {}
    for role in watch.roles():
        found, broken = _judge_role(watch, role, warm_s)
        processes[role] = found
        faults += broken
    report = {
        "seconds": round(seconds, 1),
        "warm_s": round(warm_s, 1),
        "requests": log.total(),
        "right": right,
        "wrong": len(log.wrong),
        "hung": len(log.hung),
        "errors": sum(log.errors().values()) + len(operator.faults),
        "turned_over": dict(operator.done),
        "processes": processes,
    }
    return report, faults


def _judge_role(watch: Watch, role: str, warm_s: float) -> tuple[dict[str, Any], list[str]]:
    at, memory = watch.series(role, "resident_bytes")
    if len(at) != len(watch.at):
        return {"samples": len(at)}, [f"{role} was not there all the time"]
    kept = [one for one, moment in enumerate(at) if moment >= warm_s]
    if len(kept) < 3:
        return {"samples": len(at)}, [f"{role}: too few samples after the warm-up"]
    line = trend([at[one] for one in kept], [float(memory[one]) for one in kept])
    grown = (line.last - line.first) / line.first
    found: dict[str, Any] = {
        "resident_mib": {
            "first": round(memory[0] / 2**20, 1),
            "warm": round(line.first / 2**20, 1),
            "last": round(line.last / 2**20, 1),
            "most": round(max(memory) / 2**20, 1),
        },
        "slope_mib_per_min": {
            name: round(getattr(line, field) / 2**20, 4)
            for name, field in (("fit", "per_minute"), ("low", "low"), ("high", "high"))
        },
        "grown_part": round(grown, 4),
        "trend": asdict(line),
    }
    faults = []
    if not line.is_noise and grown > GROWTH_PART:
        low, high = line.low / 2**20, line.high / 2**20
        faults.append(f"{role} grows by {low:.2f} to {high:.2f} MiB a minute ({grown:.1%} in all)")
    for kind, spread in SPREAD.items():
        values = [watch.series(role, kind)[1][one] for one in kept]
        half = len(values) // 2
        found[kind] = {"first": values[0], "least": min(values), "most": max(values)}
        # What leaks does not come back: the least of the second half shows it.
        if min(values[half:]) > max(values[: half or 1]) or max(values) - min(values) > spread:
            faults.append(f"{role}: {kind} from {min(values)} to {max(values)}")
    return found, faults


def _print(report: dict[str, Any]) -> None:
    print(
        f"\n{report['seconds']:.0f} s (the first {report['warm_s']:.0f} s are warm-up): "
        f"{report['requests']} requests, {report['right']} right, {report['wrong']} wrong, "
        f"{report['errors']} errors, {report['hung']} hung; {report['turned_over']}"
    )
    print(
        f"{'process':<10}{'warm MiB':>10}{'last MiB':>10}{'MiB/min':>10}{'95 % interval':>20}"
        f"{'descriptors':>14}{'threads':>10}"
    )
    for role, one in report["processes"].items():
        if "trend" not in one:
            print(f"{role:<10}{'incomplete':>10}")
            continue
        slope, memory = one["slope_mib_per_min"], one["resident_mib"]
        interval = f"{slope['low']:+.3f} to {slope['high']:+.3f}"
        ranges = [f"{one[kind]['least']}-{one[kind]['most']}" for kind in SPREAD]
        print(
            f"{role:<10}{memory['warm']:>10.1f}{memory['last']:>10.1f}{slope['fit']:>+10.3f}"
            f"{interval:>20}{ranges[0]:>14}{ranges[1]:>10}"
        )


if __name__ == "__main__":
    sys.exit(main())
