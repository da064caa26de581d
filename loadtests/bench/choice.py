"""The automatic choice against every strategy that can be forced, case by case.

Single layers with random weights and factors, seeded; NF4 base, bfloat16. ``auto`` may keep folded
weights in the same budget that ``cached`` has, and has seen a few calls, as in a running server.
Every strategy's answer is compared with float64 before it is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adapters.calibration import calibrate
from adapters.costs import CostModel
from adapters.folded import FoldedCache
from adapters.inject import inject
from adapters.kernels import reference
from adapters.modulation import Modulator, SlotFactors, Strategy
from adapters.plan import Plan
from adapters.quant import QuantizedWeight
from adapters.segments import from_runs
from loadtests.bench import peers
from loadtests.bench.timing import Budget, Figure, Report, Samples, alternate

FORCED: tuple[Strategy, ...] = ("native", "fold", "expand", "cached")
AT_MOST = 1.25
_EXPANDED_LIMIT = 20_000  # expanded rows beyond which expanding is not even tried
_WARM_CALLS = 40
_FOLDED_BYTES = 256 << 20
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Case:
    """``adapters`` segments of ``rows`` rows in a layer ``shape`` (out, in)."""

    shape: tuple[int, int]
    rank: int
    adapters: int
    rows: int
    folded_bytes: int = _FOLDED_BYTES

    @property
    def name(self) -> str:
        keeps = "" if self.folded_bytes else ", none kept"
        shape = "x".join(str(size) for size in self.shape)
        return f"{shape} r{self.rank}, {self.adapters} x {self.rows}{keeps}"


CASES = (
    # The table of the design: U adapters x T tokens, with and without room for folded weights.
    Case((768, 768), 32, 8, 256),
    Case((768, 768), 32, 8, 256, 0),
    Case((768, 768), 32, 16, 1),
    Case((768, 768), 32, 16, 1, 0),
    Case((2048, 2048), 8, 16, 1),
    Case((2048, 2048), 8, 16, 1, 0),
    Case((2048, 2048), 32, 8, 1),
    Case((2048, 2048), 32, 8, 1, 0),
    # And between.
    Case((768, 768), 32, 1, 16, 0),
    Case((768, 768), 32, 32, 32),
    Case((768, 768), 32, 32, 32, 0),
    Case((512, 512), 32, 16, 4, 0),
    Case((1408, 512), 64, 4, 2, 0),
    Case((512, 1408), 128, 4, 64, 0),
    Case((3072, 768), 8, 8, 8),
)


def bench(report: Report) -> None:
    """Run all cases."""
    report.section(f"Choice: auto against the best forced strategy, {report.threads} threads")
    torch.set_num_threads(report.threads)
    budget = Budget(0.0, 1, 1) if report.quick else Budget(4.0, 5, 25)
    cases = CASES[::4] if report.quick else CASES
    costs = _costs(sorted({case.shape for case in cases}), report)
    for case in cases:
        with torch.inference_mode():
            _measure(case, costs, budget, report)


def _costs(shapes: list[tuple[int, int]], report: Report) -> CostModel:
    """As a server's start measures and keeps them."""
    model = nn.ModuleList([nn.Linear(i, o, bias=False).bfloat16() for o, i in shapes])
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    adapted = inject(peers.quantized(model))
    with tempfile.TemporaryDirectory() as folder:
        costs = calibrate(adapted, torch.bfloat16, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    report.add(
        Figure("choice", "calibration", "shape classes", len(costs.table), unit="",
               note=f"a file of {size} bytes")
    )  # fmt: skip
    return costs


def _measure(case: Case, costs: CostModel, budget: Budget, report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = case.shape
    dense = torch.randn(case.shape, generator=generator).bfloat16()
    weight = QuantizedWeight.from_dense(dense, "nf4", double_quant=False)
    slots = {}
    for slot in range(1, case.adapters + 1):
        a = torch.randn(case.rank, in_features, generator=generator)
        b = torch.randn(out_features, case.rank, generator=generator) * (0.3 / case.rank**0.5)
        slots[slot] = SlotFactors("hira", a.bfloat16(), b.bfloat16())
    segments = from_runs((slot, case.rows) for slot in slots)
    x = torch.randn(segments.rows, in_features, generator=generator).bfloat16()
    entries = {slot: ("hira", f.a, f.b, 1.0, None) for slot, f in slots.items()}
    truth = reference.modulated_linear(x, weight.dequantize(), entries, segments, None)
    sides: dict[str, Callable[[], torch.Tensor]] = {}
    for strategy in ("auto", *FORCED):
        if strategy == "expand" and segments.rows * case.rank > _EXPANDED_LIMIT:
            continue
        if strategy == "cached" and not case.folded_bytes:
            continue
        modulator = Modulator(strategy, costs)
        modulator.folded = FoldedCache(case.folded_bytes, torch.device("cpu"))

        def run(modulator: Modulator = modulator) -> torch.Tensor:
            with modulator.planned(Plan(segments)):
                return modulator.linear(x, weight, slots, segments, None, layer="l")

        sides[strategy] = run
        for _ in range(1 if report.quick else _WARM_CALLS):
            y = run()
            if not modulator.folded.budget_bytes:
                break
        error = float((y.double() - truth).norm() / truth.norm())
        if error > _TOLERANCE:
            raise SystemExit(f"{case.name}: {strategy} is off by {error:.2g}")
    _tell(case, alternate(sides, budget, report.clock), report)


def _tell(case: Case, samples: Samples, report: Report) -> None:
    forced = [name for name in samples.seconds if name != "auto"]
    best = min(forced, key=samples.best)
    times = ", ".join(f"{name} {samples.best(name) * 1e3:.2f}" for name in samples.seconds)
    # Of the best times: a moment in which something else ran would decide a ratio of single rounds.
    ratio = samples.best("auto") / samples.best(best)
    report.add(
        Figure("choice", case.name, f"time of {best}", ratio, at_most=AT_MOST, note=f"ms: {times}")
    )
