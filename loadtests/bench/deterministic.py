"""What ``--deterministic`` costs on this machine: the same decoding with and without it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from adapters.registry.store import Store
from loadtests.bench.generation import Alone, Made, generate_all, made
from loadtests.bench.timing import THREADS, Budget, Figure, Report, alternate
from server.engine.engine import Engine
from server.options import EngineOptions


def bench(report: Report) -> None:
    """Alternate both engines on one base."""
    report.section("Deterministic: 16 requests on 16 adapters, with and without it")
    torch.set_num_threads(THREADS)
    budget = Budget(0.0, 1, 1) if report.quick else Budget(60.0, 3, 7)
    with made() as folders, tempfile.TemporaryDirectory(prefix="hira-bench-") as name:
        sides = {
            kind: _engine(folders, Path(name) / kind, deterministic=kind == "deterministic")
            for kind in ("default", "deterministic")
        }
        try:
            for one in sides.values():
                generate_all(one)
            samples = alternate(
                {kind: lambda one=one: generate_all(one) for kind, one in sides.items()},  # type: ignore[misc]
                budget,
                report.clock,
            )
        finally:
            for one in sides.values():
                one.engine.close()
    speed = samples.speed("deterministic", "default")
    report.add(Figure("deterministic", "decoding", "speed of the default", speed))


def _engine(folders: Made, root: Path, *, deterministic: bool) -> Alone:
    store = Store(root / "store")
    generators = tuple(store.add(folder) for folder in folders.generators)
    engine = Engine.build(
        EngineOptions(
            base=str(folders.base),
            store_dir=root / "store",
            cache_dir=root / "cache",
            dtype="bf16",
            device="cpu",
            threads=THREADS,
            deterministic=deterministic,
        )
    )
    return Alone(engine, generators, ())
