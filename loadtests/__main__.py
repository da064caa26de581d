"""Runs Locust scenarios against a server of one's own, and judges: `python -m loadtests`.

`python -m loadtests spike --seconds 120` runs one, without a name all run one after the other until
a pass mark is broken. The exit status is not 0 when one is, when an answer was wrong or an error
unexpected, or when the server did not come up or go down as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loadtests.scenarios import (
    COMMON,
    RARE,
    REFUSED,
    REMOVED,
    SCENARIOS,
    TRICKLED,
    WRONG,
    Mark,
    Scenario,
)
from loadtests.servers import Server, start_server
from loadtests.stage import set_stage
from loadtests.traffic import percentile
from loadtests.verdict import verdict
from loadtests.watch import Sample, look

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
QUEUE = 96  # of the server: fewer than the largest crowd
SETTLE_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("scenario", nargs="*", help=f"{', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--seconds", type=int, help="of each scenario; short by default")
    parser.add_argument("--variants", type=int, default=12, help="adapters registered beforehand")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--results", type=Path, default=Path("loadtests/results"))
    options = parser.parse_args()
    names = options.scenario or list(SCENARIOS)
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    options.results.mkdir(parents=True, exist_ok=True)
    began, faults = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="hira-loadtest-") as folder:
        queue = f"--max-queue-requests={QUEUE}"
        server = start_server(Path(folder), options.dtype, options.results, queue)
        try:
            server.wait_until_ready()
            key = server.admin["Authorization"].removeprefix("Bearer ")
            stage = set_stage(server.url, key, DEMO_DIR, options.variants, options.dtype)
            stage.save(stage_path(options))
            for name in names:
                faults = run(name, server, options)
                if faults:
                    break
        finally:
            stopped = server.stop()
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {server.log})")
    print(f"\n{len(names)} scenarios, {time.monotonic() - began:.0f} s: {options.results}/*.html")
    return verdict(faults)


def stage_path(options: argparse.Namespace) -> Path:
    """Where the adapters under test and their answers are kept for Locust's process."""
    return Path(options.results) / "stage.json"


def run(name: str, server: Server, options: argparse.Namespace) -> list[str]:
    """Run one scenario and write its report; returns what broke a pass mark."""
    scenario = SCENARIOS[name]
    seconds = options.seconds or scenario.seconds
    print(f"\n{name}: {scenario.what}, {seconds} s", flush=True)
    raw = options.results / f"{name}.raw.json"
    raw.unlink(missing_ok=True)
    before = look(server)
    status = run_locust(name, seconds, server, raw, options)
    time.sleep(SETTLE_S)  # connections close, work of clients that left ends
    after = look(server)
    if status != 0 or not raw.exists():
        return [f"{name}: locust ended with status {status}"]
    report = summary(json.loads(raw.read_text()), scenario, seconds, (before, after))
    raw.unlink()
    marks = [judged(mark, report) for mark in scenario.marks]
    for mark in marks:
        print(f"  {'ok  ' if mark['holds'] else 'FAIL'} {mark['what']:<48}{mark['value']:>9.3g}"
              f"  {mark['limit']}")  # fmt: skip
    for line in report["failures"][:10]:
        print(f"  {line}")
    told = {"scenario": name, "what": scenario.what, "seconds": seconds, "marks": marks, **report}
    (options.results / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    return [
        f"{name}: {mark['what']}: {mark['value']:.4g}, must be {mark['limit']}"
        for mark in marks
        if not mark["holds"]
    ] + [f"{name}: {line}" for line in report["failures"][:5]]


def judged(mark: Mark, report: dict[str, Any]) -> dict[str, Any]:
    value = mark.value(report)
    holds = mark.holds(report)
    return {"what": mark.what, "value": round(value, 4), "limit": mark.limit, "holds": holds}


def run_locust(
    name: str, seconds: int, server: Server, raw: Path, options: argparse.Namespace
) -> int:
    """Let Locust run the scenario; it writes its page and ``raw``."""
    command = [
        *(sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py"))),
        *("--headless", "--only-summary", "--host", server.url, "--stop-timeout", "60"),
        *("--html", str(options.results / f"{name}.html"), "--loglevel", "WARNING"),
        *("--exit-code-on-error", "0"),  # judged here
    ]
    environment = {
        **os.environ,
        "HIRA_LOADTEST_SCENARIO": name,
        "HIRA_LOADTEST_SECONDS": str(seconds),
        "HIRA_LOADTEST_JSON": str(raw.resolve()),
        "HIRA_LOADTEST_ADMIN_KEY": server.admin["Authorization"].removeprefix("Bearer "),
        "HIRA_LOADTEST_STAGE": str(stage_path(options).resolve()),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    log = options.results / f"{name}.log"
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


def summary(
    raw: dict[str, Any], scenario: Scenario, seconds: float, looks: tuple[Sample, Sample]
) -> dict[str, Any]:
    """The figures of a run, by stage and name; see `locustfile.Stretches` for ``raw``."""
    parts = {stage.name: stage.part for stage in scenario.stages}
    stages: dict[str, dict[str, Any]] = {}
    whole: dict[str, list[float]] = {}
    for stage, name, values in raw["good"]:
        rate = len(values) / (parts[stage] * seconds) if stage in parts else float("nan")
        stages.setdefault(stage, {})[name] = {**quantiles(values), "good_per_s": round(rate, 2)}
        whole.setdefault(name, []).extend(values)
    stages["all"] = {
        name: {**quantiles(values), "good_per_s": round(len(values) / seconds, 2)}
        for name, values in whole.items()
    }
    failed = [
        (name, text, number) for _, name, texts in raw["failed"] for text, number in texts.items()
    ]

    def total(*names: str) -> int:
        return sum(len(whole.get(name, ())) for name in names)

    return {
        "good": sum(map(len, whole.values())) - total(REFUSED, COMMON, RARE),
        "refused": total(REFUSED),
        "trickled": total(TRICKLED),
        "turned_over": total(REMOVED),
        "adapters": raw["adapters"],
        "wrong": sum(number for _, text, number in failed if WRONG in text),
        "errors": sum(number for _, text, number in failed if WRONG not in text),
        "failures": sorted({f"{name}: {text} x{number}" for name, text, number in failed}),
        "memory_ratio": most_grown(*looks, "resident_bytes"),
        "descriptor_ratio": most_grown(*looks, "descriptors"),
        "processes": {"before": looks[0], "after": looks[1]},
        "stages": stages,
    }


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    return {
        "count": len(milliseconds),
        "mean_ms": round(statistics.fmean(milliseconds), 1),
        "p50_ms": round(percentile(milliseconds, 0.5), 1),
        "p95_ms": round(percentile(milliseconds, 0.95), 1),
        "p99_ms": round(percentile(milliseconds, 0.99), 1),
    }


def most_grown(before: Sample, after: Sample, kind: str) -> float:
    """End over start of the process that grew most; NaN when one is new or gone."""
    if before.keys() != after.keys():
        return float("nan")
    return round(max(after[role][kind] / before[role][kind] for role in before), 3)


if __name__ == "__main__":
    sys.exit(main())
