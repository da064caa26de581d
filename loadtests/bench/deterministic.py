"""What ``--deterministic`` costs on this machine: the same decoding with and without it."""

from __future__ import annotations

import torch

from loadtests.bench.generation import built, generate_all, made
from loadtests.bench.timing import THREADS, Budget, Figure, Report, alternate


def bench(report: Report) -> None:
    """Alternate both engines on one base."""
    report.section("Deterministic: 16 requests on 16 adapters, with and without it")
    torch.set_num_threads(THREADS)
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
