"""Offers a server more than it can do: `python -m loadtests.saturation --kind generate`.

First its capacity is found with closed loops of growing size; then requests arrive at 1, 2, 5 and
20 times that rate, in an open loop. Goodput must stay or be nine tenths of what was sent, what is
accepted must be answered in bounded time, all else must be refused with 429 and a usable
Retry-After, and memory must stay flat.

Load is only as high as the generator can make it: the offered rate in the table is what left it.
It shares the processor with the server, so the table also says what each takes: the generator in
cores, the server in milliseconds of all its processes for an answer. Sending and refusing all that
is too much takes processor time that no answer gets; `beside` is the goodput against clients of a
closed loop beside a process that takes as much, so what is left of it is the server's own loss.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from loadtests.busy import busy_processes
from loadtests.connection import Reply, encoded
from loadtests.openloop import Outcome, Pool, Question, capacity, offer
from loadtests.servers import Server, ready_server
from loadtests.stage import PROMPTS, TEXTS, Adapter, Stage, set_stage
from loadtests.verdict import verdict
from loadtests.watch import Watch

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
CROWDS = (16, 32, 64, 96)
KINDS = ("predict", "generate", "mixed")
NEW_TOKENS = 48
TEXTS_EACH = 16  # so that a request is mostly the model's work
MIN_GOODPUT = 0.9
GROWTH_BYTES = 96 << 20
FEW = 16  # clients whose goodput open-loop load is held against
SLACK = 2.0  # p99 of what is accepted, over the time that a full queue takes to drain
RETRY_MAX_S = 60
REFUSED = ("429 overloaded", "429 wait_too_long")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.saturation", description=__doc__)
    parser.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each level")
    parser.add_argument("--levels", type=float, nargs="+", default=[1.0, 2.0, 5.0, 20.0])
    parser.add_argument("--queue", type=int, default=128, help="max_queue_requests of the server")
    parser.add_argument("--connections", type=int, default=1000, help="most, of the generator")
    parser.add_argument("--variants", type=int, default=12, help="adapters registered beforehand")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("loadtests/results/saturation.json"))
    options = parser.parse_args()
    kinds = KINDS if options.kind == "all" else (options.kind,)
    reports, faults = [], []
    for kind in kinds:
        report, found = saturate(kind, options)
        reports.append(report)
        faults += [f"{kind}: {one}" for one in found]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"runs": reports, "faults": faults}, indent=1) + "\n")
    return verdict(faults)


def saturate(kind: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """One server, all levels; returns the figures and what broke a pass mark."""
    results = Path("loadtests/results/saturation")
    arguments = (f"--max-queue-requests={options.queue}",)
    with (
        tempfile.TemporaryDirectory(prefix="hira-saturation-") as folder,
        ready_server(Path(folder), options.dtype, results, *arguments) as server,
    ):
        key = server.admin["Authorization"].removeprefix("Bearer ")
        stage = set_stage(
            server.url, key, DEMO_DIR, options.variants, options.dtype, new_tokens=NEW_TOKENS
        )
        questions = itertools.cycle(_questions(kind, stage, random.Random(options.seed)))
        ask: Callable[[], Question] = questions.__next__
        with Watch(server, every_s=0.5) as watch:
            report, faults = asyncio.run(_levels(server, ask, watch, options))
        stopped = server.stop()
    if stopped != 0:
        faults.append(f"the server ended with status {stopped}")
    report = {"kind": kind, "queue": options.queue, "dtype": options.dtype, **report}
    _print(report)
    return report, faults


async def _levels(
    server: Server, ask: Callable[[], Question], watch: Watch, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    await capacity(server.port, ask, CROWDS[:1], 2.0)  # adapters come in, buffers are made
    found = await capacity(server.port, ask, CROWDS, min(8.0, options.seconds))
    crowd, per_s = max(found.items(), key=lambda one: one[1])
    few_s = min(8.0, options.seconds)
    spent, of_http, own = _cpu_s(server), _cpu_s(server, "http"), time.process_time()
    few_per_s = (await capacity(server.port, ask, (FEW,), few_s))[FEW]
    few_ms = (_cpu_s(server) - spent) / (few_per_s * few_s) * 1e3
    few_own = (time.process_time() - own) / few_s
    http_s_each = (_cpu_s(server, "http") - of_http) / (few_per_s * few_s)
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    pool = Pool(server.port, options.connections)
    before = watch.peak("resident_bytes", since_s=watch.now_s - 2.0)
    for level in options.levels:
        began, spent, of_http = watch.now_s, _cpu_s(server), _cpu_s(server, "http")
        outcome = await offer(pool, ask, level * per_s, options.seconds, options.seed)
        spent = _cpu_s(server) - spent
        of_http = _cpu_s(server, "http") - of_http
        await asyncio.sleep(1.0)
        row = _row(level, outcome, watch.peak("resident_bytes", since_s=began))
        row["goodput_of_few"] = round(outcome.goodput_per_s / few_per_s, 3)
        # What closed loops have less of: the generator's work, and that of refusing, which is done
        # by the one HTTP process there is.
        refusing = of_http - http_s_each * (outcome.good + outcome.late)
        more = [max(0.0, outcome.own_cpu - few_own), max(0.0, refusing / options.seconds)]
        with busy_processes(1, more[0]), busy_processes(1, more[1], niceness=_niceness(server)):
            beside = (await capacity(server.port, ask, (FEW,), few_s))[FEW]
        row["more_cores"] = round(sum(more), 2)
        row["goodput_beside"] = round(outcome.goodput_per_s / beside, 3)
        row["server_cpu_ms"] = round(spent / max(1, outcome.good + outcome.late) * 1e3, 1)
        row["queue_s"] = round(options.queue / few_per_s, 2)
        rows.append(row)
        faults += [f"{level:g}x: {one}" for one in outcome.faults[:5]]
    pool.close()
    best = max(per_s, *(row["goodput_per_s"] for row in rows))
    for row in rows:
        row["goodput_of_best"] = round(row["goodput_per_s"] / best, 3)
    bound_s = SLACK * options.queue / per_s + 1.0
    faults += [fault for row in rows for fault in level_faults(row, before, bound_s)]
    report = {
        "capacity_per_s": round(per_s, 2),
        "capacity_clients": crowd,
        "closed_loop_per_s": {str(size): round(rate, 2) for size, rate in found.items()},
        "few_per_s": round(few_per_s, 2),
        "few_server_cpu_ms": round(few_ms, 1),
        "p99_bound_s": round(bound_s, 2),
        "resident_before": before,
        "levels": rows,
    }
    return report, faults


def _cpu_s(server: Server, role: str = "") -> float:
    """Processor seconds that the server's processes of a role, or all, have taken so far."""
    pids = (pid for name, pid in server.roles().items() if name.startswith(role))
    times = (psutil.Process(pid).cpu_times() for pid in pids)
    return float(sum(one.user + one.system for one in times))


def _niceness(server: Server) -> int:
    """By how much the HTTP process gives way to this one."""
    http = next(pid for name, pid in server.roles().items() if name.startswith("http"))
    return max(0, int(psutil.Process(http).nice()) - int(psutil.Process().nice()))


def _questions(kind: str, stage: Stage, rng: random.Random, count: int = 512) -> list[Question]:
    """Requests for all adapters by Zipf's law, encoded once."""
    found = []
    for number in range(count):
        generating = kind == "generate" or (kind == "mixed" and number % 4 == 0)
        adapter = stage.pick(stage.generators if generating else stage.classifiers, rng)
        found.append(
            _generation(stage, adapter, rng) if generating else _prediction(stage, adapter, rng)
        )
    return found


def _prediction(stage: Stage, adapter: Adapter, rng: random.Random) -> Question:
    texts = rng.choices(TEXTS, k=TEXTS_EACH)

    def fault(reply: Reply) -> str | None:
        if reply.header("X-Adapter-Version") != adapter.version:
            return f"version {reply.header('X-Adapter-Version')} of {adapter.name}"
        found = (
            stage.fault_in_scores(adapter, text, answer)
            for text, answer in zip(texts, reply.json(), strict=True)
        )
        return next((one for one in found if one), None)

    return Question(encoded(f"/predict?adapter={adapter.name}", {"inputs": texts}), fault)


def _generation(stage: Stage, adapter: Adapter, rng: random.Random) -> Question:
    prompt = rng.choice(PROMPTS)
    parameters = {"max_new_tokens": stage.new_tokens}

    def fault(reply: Reply) -> str | None:
        if reply.header("X-Adapter-Version") != adapter.version:
            return f"version {reply.header('X-Adapter-Version')} of {adapter.name}"
        return stage.fault_in_text(adapter, prompt, reply.json()["generated_text"], 1)

    body = {"inputs": prompt, "parameters": parameters}
    return Question(encoded(f"/generate?adapter={adapter.name}", body), fault)


def _row(level: float, outcome: Outcome, peak: dict[str, int]) -> dict[str, Any]:
    lists = {"latencies", "refusal_latencies", "retry_after_s", "faults"}
    plain = {name: value for name, value in vars(outcome).items() if name not in lists}
    waits = outcome.retry_after_s
    return {
        "level": level,
        **plain,
        "own_cpu": round(outcome.own_cpu, 2),
        "offered_per_s": round(outcome.offered_per_s, 1),
        "goodput_per_s": round(outcome.goodput_per_s, 2),
        "accepted_s": _quantiles(outcome.latencies),
        "refused_s": _quantiles(outcome.refusal_latencies),
        "retry_after_s": _quantiles(waits),
        "resident_peak": peak,
        "wrong": len(outcome.faults),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        name: round(ordered[round(part * last)], 4)
        for name, part in (("p0", 0.0), ("p50", 0.5), ("p99", 0.99), ("p100", 1.0))
    }


def level_faults(row: dict[str, Any], before: dict[str, int], bound_s: float) -> list[str]:
    """What broke a pass mark at one level."""
    level, found = f"{row['level']:g}x", []
    # Where less was sent than can be done, that is the best there can be.
    short = row["goodput_per_s"] < MIN_GOODPUT * row["offered_per_s"]
    if short and row["goodput_of_best"] < MIN_GOODPUT:
        found.append(f"{level}: goodput is {row['goodput_of_best']:.2f} of the best")
    if row["accepted_s"].get("p99", 0.0) > bound_s:
        found.append(f"{level}: p99 of accepted {row['accepted_s']['p99']:.1f} s > {bound_s:.1f} s")
    strange = {
        name: count for name, count in row["statuses"].items() if name not in {"200", *REFUSED}
    }
    if strange or row["unanswered"]:
        found.append(f"{level}: neither 200 nor 429: {strange}, unanswered {row['unanswered']}")
    if row["retry_after_s"] and not 1 <= row["retry_after_s"]["p100"] <= RETRY_MAX_S:
        found.append(f"{level}: Retry-After up to {row['retry_after_s']['p100']:.0f} s")
    for role, peak in row["resident_peak"].items():
        grown = peak - before.get(role, peak)
        if grown > GROWTH_BYTES:
            found.append(f"{level}: {role} grew by {grown / 2**20:.0f} MiB")
    return found


def _print(report: dict[str, Any]) -> None:
    print(
        f"\n{report['kind']}: capacity {report['capacity_per_s']:.1f} requests/s "
        f"({report['capacity_clients']} clients), {report['dtype']}, queue of {report['queue']}, "
        f"p99 bound {report['p99_bound_s']:.1f} s, {time.strftime('%Y-%m-%d')}\n"
        f"{FEW} clients: {report['few_per_s']:.1f} requests/s, "
        f"{report['few_server_cpu_ms']:.1f} ms of processor for an answer"
    )
    print(
        f"{'load':>5}{'due/s':>9}{'sent/s':>9}{'good/s':>9}{'of best':>9}{f'of {FEW}':>7}"
        f"{'beside':>8}"
        f"{'p50 s':>7}{'p99 s':>7}"
        f"{'429':>7}{'429 p99 s':>10}{'retry s':>9}{'other':>6}{'http MiB':>9}{'wrk MiB':>8}"
        f"{'own':>6}{'more':>6}{'srv ms':>8}"
    )
    for row in report["levels"]:
        statuses = row["statuses"]
        refused = sum(statuses.get(code, 0) for code in REFUSED)
        other = sum(statuses.values()) - statuses.get("200", 0) - refused + row["unanswered"]
        waits, accepted = row["retry_after_s"], row["accepted_s"]
        retry = f"{waits['p0']:.0f}-{waits['p100']:.0f}" if waits else "-"
        peak = row["resident_peak"]
        http = sum(value for role, value in peak.items() if role.startswith("http"))
        print(
            f"{row['level']:>4g}x{row['rate_per_s']:>9.1f}{row['offered_per_s']:>9.1f}"
            f"{row['goodput_per_s']:>9.1f}{row['goodput_of_best']:>9.2f}"
            f"{row['goodput_of_few']:>7.2f}{row['goodput_beside']:>8.2f}"
            f"{accepted.get('p50', 0):>7.2f}{accepted.get('p99', 0):>7.2f}{refused:>7}"
            f"{row['refused_s'].get('p99', 0):>10.2f}{retry:>9}{other:>6}{http / 2**20:>9.0f}"
            f"{peak.get('worker-0', 0) / 2**20:>8.0f}{row['own_cpu']:>6.2f}"
            f"{row['more_cores']:>6.2f}"
            f"{row['server_cpu_ms']:>8.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
