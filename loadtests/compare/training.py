"""Runs the recipe once for each method and task, some at a time, each in a process of its own.

A process of its own is what makes its peak of memory its own. A run that was made before with the
same command is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.compare.plan import METHODS, SENTIMENT, Method, Plan, Task
from loadtests.compare.sources import training_file


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        folder: Of the adapter.
        report: As the recipe wrote it.
    """

    task: Task
    method: Method
    folder: Path
    report: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the adapter on the server."""
        return self.folder.name


@dataclass(frozen=True)
class Base:
    """A base by the folder it lies in and the name that adapters know it by."""

    folder: Path
    name: str


def train_all(
    plan: Plan, bases: dict[str, Base], root: Path, work: Path, *, jobs: int, threads: int
) -> list[Trained]:
    """Train every method on every task.

    Args:
        plan: What is compared.
        bases: By kind of task.
        root: Of the public files.
        work: Adapters, rows and logs are kept here.
        jobs: Runs at one time.
        threads: Of each run.

    Raises:
        SystemExit: A run failed; its log is named.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = {task.key: training_file(task, root, work) for task in plan.tasks}

    def run(pair: tuple[Task, Method]) -> Trained:
        task, method = pair
        out = work / f"{task.key}-{method.key}"
        base = bases[task.kind]
        command = [
            *(sys.executable, "-W", "ignore", "-m", "server.training"),
            *("--base", str(base.folder), "--base-name", base.name),
            *("--train", str(files[task.key]), "--out", str(out)),
            *("--method", method.name, "--rank", str(method.rank), "--task-type", task.kind),
            *(
                "--epochs",
                str(plan.epochs),
                "--evaluations",
                "2",
                "--max-tokens",
                str(task.max_tokens),
            ),
            *("--learning-rate", f"{task.rates[method.name]:g}"),
            *("--eval-rows", str(task.set_aside), "--threads", str(threads), "--autocast"),
        ]
        if task.kind == "SEQ_CLS":
            command += ["--labels", ",".join(SENTIMENT)]
        report = _run(command, out)
        print(f"{out.name:<24}{_summary(report)}", flush=True)
        return Trained(task, method, out, report)

    pairs = [(task, method) for task in plan.tasks for method in METHODS]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, pairs))


def _run(command: list[str], out: Path) -> dict[str, Any]:
    report, made_by = out.with_suffix(".json"), out.with_suffix(".command")
    if report.is_file() and made_by.is_file() and made_by.read_text() == " ".join(command):
        found: dict[str, Any] = json.loads(report.read_text())
        return found
    shutil.rmtree(out, ignore_errors=True)
    report.unlink(missing_ok=True)
    log = out.with_suffix(".log")
    # Threads that spin while they wait slow one another down where runs share the cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.getcwd()}
    with log.open("wb") as output:
        status = subprocess.run(
            [*command, "--report", str(report)],
            stdout=output,
            stderr=output,
            env=environment,
            # Linux shares the cores between sessions first, so each run is one of its own.
            start_new_session=True,
            check=False,
        ).returncode
    if status != 0:
        raise SystemExit(f"{out.name} ended with status {status}; see {log}")
    made_by.write_text(" ".join(command))
    made: dict[str, Any] = json.loads(report.read_text())
    return made


def _summary(report: dict[str, Any]) -> str:
    best = ", ".join(f"{name} {value:.4f}" for name, value in report["best"].items())
    return (
        f"{report['steps']} steps in {report['seconds']:.0f} s; step {report['best_step']}: {best}"
    )
