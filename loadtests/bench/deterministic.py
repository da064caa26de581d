"""``--deterministic``: a thousand random batches in each lane without a bit that differs, and its
cost on this machine."""

from __future__ import annotations

import torch

from loadtests.bench import random_batches
from loadtests.bench.generation import built, generate_all, made
from loadtests.bench.random_batches import BatchLane
from loadtests.bench.timing import Budget, Figure, Report, alternate
from server.options import DType, Quantization

# In float32 with and without 4 bits, and as a base is usually served.
_STORED: tuple[tuple[DType, Quantization], ...] = (
    ("fp32", "none"),
    ("fp32", "nf4"),
    ("bf16", "nf4"),
)


def bench(report: Report) -> None:
    """Random batches of each lane, then decoding with and without it, alternated on one base."""
    batches = 20 if report.quick else random_batches.BATCHES
    report.section(f"Deterministic: {batches} random batches in each lane, alone and mixed")
    torch.set_num_threads(report.threads)
    lanes: tuple[BatchLane, ...] = ("generation", "encoding")
    for lane in lanes:
        for dtype, quantization in _STORED[: 1 if report.quick else None]:
            random_batches.measure(report, lane, dtype, quantization, batches=batches)
    report.section("Deterministic: 16 requests on 16 adapters, with and without it")
    budget = Budget(0.0, 1, 1) if report.quick else Budget(60.0, 3, 7)
    with (
        made() as folders,
        built(folders, report.dtype) as usual,
        built(folders, report.dtype, deterministic=True) as deterministic,
    ):
        for one in (usual, deterministic):
            generate_all(one)
        samples = alternate(
            {
                "default": lambda: generate_all(usual),
                "deterministic": lambda: generate_all(deterministic),
            },
            budget,
            report.clock,
        )
    speed = samples.speed("deterministic", "default")
    report.add(Figure("deterministic", "decoding", "speed of the default", speed))
