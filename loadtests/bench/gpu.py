"""On a GPU, in one run of at most five minutes: layers, texts, steps, prompts, swaps, HTTP, peers.

Each part has a time of its own: what no longer fits is left out, and the report says what. A part
that fails does not end the others. Where there is no GPU that is said, and nothing is measured;
with ``--dry-run`` every part runs on the processor all the same, on shapes of nothing, so that its
mistakes are found before a GPU is paid for.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from adapters.modulation.kernel_probe import obstacle
from loadtests.bench import gpu_bases, gpu_encode, gpu_engine, gpu_layers
from loadtests.bench.gpu_bases import Shape, StepGoals
from loadtests.bench.gpu_engine import Amounts
from loadtests.bench.on_device import card_of
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Report

_COST_TURNS = 8  # of the comparison with the default; all others are for more batches
LIMIT_S = 290.0  # of all parts together; the rest of five minutes is for imports and the report
TINY = Shape(
    "tiny", 128, 256, 2, 2, 1, tied=True, goals=StepGoals(1.0, 1.0, 1.0), max_sequences=4,
    kv_bytes=1 << 22,
)  # fmt: skip
TINY_AMOUNTS = Amounts(3, 2, 6144, 20, 4, (2,), 1)
TINY_TEXTS = (gpu_encode.EncodeCase(3, 8, 2, 0.5, 1e6),)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the run.

    Args:
        name: Of its section.
        seconds: That it may take, beside what earlier parts left over.
        run: Does it, until the clock says that its time is up.
    """

    name: str
    seconds: float
    run: Callable[[Report, torch.device, PartClock], None]


def _layers(report: Report, device: torch.device, clock: PartClock) -> None:
    tiny = report.dry_run
    cases = gpu_layers.TINY_LAYERS if tiny else gpu_layers.LAYER_CASES
    gpu_layers.measure_layers(report, cases, device, clock)


def _texts(report: Report, device: torch.device, clock: PartClock) -> None:
    if report.dry_run:
        gpu_encode.measure_encode(report, device, clock, TINY_TEXTS, hidden=64, layers=1, rounds=1)
    else:
        gpu_encode.measure_encode(report, device, clock)


def _small(report: Report, device: torch.device, clock: PartClock) -> None:
    shape = TINY if report.dry_run else gpu_bases.SHAPES[0]
    amounts = TINY_AMOUNTS if report.dry_run else Amounts()
    kinds = gpu_engine.LARGE_KINDS if report.dry_run else gpu_engine.SMALL_KINDS
    gpu_engine.measure_engine(report, shape, device, amounts, clock=clock, kinds=kinds)


def _large(report: Report, device: torch.device, clock: PartClock) -> None:
    if report.dry_run:
        return  # it is the small one with other numbers
    amounts = replace(Amounts(), more_tokens=16, swaps=0, clients=(), rounds=1)
    gpu_engine.measure_engine(
        report, gpu_bases.SHAPES[1], device, amounts, clock=clock, kinds=gpu_engine.LARGE_KINDS
    )


def _has_more(clock: PartClock, least_s: float) -> bool:
    return clock.left_s > least_s


def _deterministic(report: Report, device: torch.device, clock: PartClock) -> None:
    from loadtests.bench import random_batches

    if report.dry_run:
        random_batches.measure(
            report, "encoding", "fp32", "none", batches=1, count=2, cost_turns=1, at_least=1
        )
        return
    ends = clock.left_s
    lanes: tuple[random_batches.BatchLane, ...] = ("generation", "encoding")
    for number, lane in enumerate(lanes, start=1):
        left_s = ends * (1 - number / len(lanes))
        if clock.has_time(lane):
            # Requests that are answered alone are few: the time is for batches.
            random_batches.measure(
                report, lane, "bf16", "nf4", count=40, device="cuda", cost_turns=_COST_TURNS,
                has_time=partial(_has_more, clock, left_s), at_least=random_batches.BATCHES,
            )  # fmt: skip


PARTS = (
    Part("layers, NF4, bfloat16, HiRA; out x in, rank, rows / adapters", 40.0, _layers),
    Part("texts, BERT-base shape", 30.0, _texts),
    Part("a 1.2 B Llama shape", 98.0, _small),
    Part("an 8 B Llama shape", 98.0, _large),
    Part("deterministic", 24.0, _deterministic),
)


def bench(report: Report) -> None:
    """Run all parts, or say why none is run."""
    report.section("GPU")
    device = torch.device("cpu")
    if torch.cuda.is_available() and not report.dry_run:
        device = torch.device("cuda", torch.cuda.current_device())
        reason = obstacle(torch.bfloat16, device)
        if reason is not None:
            report.leave_out(f"the fused kernel, which cannot run here: {reason}")
    elif not report.dry_run:
        print("no GPU: skipped")
        return
    report.machine = {**report.machine, **card_of(device)}
    if report.dry_run:
        report.quick = True
    scale = 10 if report.dry_run else 1
    began, given = time.monotonic(), 0.0
    for part in PARTS:
        report.section(f"GPU: {part.name}")
        # What the parts before did not use is there for this one, and what they overran is not.
        given += part.seconds * scale
        clock = PartClock(report, part.name, given - (time.monotonic() - began))
        try:
            part.run(report, device, clock)
        # The minutes of the other parts are paid for, too.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            traceback.print_exc()
            report.leave_out(f"{part.name}: {type(error).__name__}: {' '.join(str(error).split())}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
