"""The automatic choice against every strategy that can be forced, case by case.

Single layers with random weights and factors, seeded; NF4 base. ``auto`` may keep folded weights in
the same budget that ``cached`` has, and has timed its candidates on a few calls before, as in a
running server. Every strategy's answer is compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.kernels import native_ops, reference
from adapters.modulation.autotune import Autotuner
from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator
from adapters.modulation.plan import Plan
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import Strategy
from adapters.segments import from_runs
from loadtests.bench.timing import Budget, Figure, Report, Samples, alternate

FORCED: tuple[Strategy, ...] = ("native", "fold", "expand", "cached")
AT_MOST = 1.1
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
    title = "Choice: auto against the best forced strategy"
    report.section(f"{title}, {report.dtype}, {report.threads} threads")
    torch.set_num_threads(report.threads)
    budget = Budget(0.0, 1, 1) if report.quick else Budget(4.0, 5, 25)
    cases = CASES[::4] if report.quick else CASES
    for case in cases:
        with torch.inference_mode():
            _measure(case, budget, report)


def _measure(case: Case, budget: Budget, report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = case.shape
    dtype = report.torch_dtype
    dense = torch.randn(case.shape, generator=generator).to(dtype)
    weight = QuantizedWeight.from_dense(dense, "nf4", double_quant=False)
    slots = {}
    for slot in range(1, case.adapters + 1):
        a = torch.randn(case.rank, in_features, generator=generator)
        b = torch.randn(out_features, case.rank, generator=generator) * (0.3 / case.rank**0.5)
        slots[slot] = SlotFactors("hira", a.to(dtype), b.to(dtype))
    segments = from_runs((slot, case.rows) for slot in slots)
    x = torch.randn(segments.rows, in_features, generator=generator).to(dtype)
    entries = {slot: ("hira", f.a, f.b, 1.0, None) for slot, f in slots.items()}
    truth = reference.modulated_linear(x, weight.dequantize(), entries, segments, None)
    sides: dict[str, Callable[[], torch.Tensor]] = {}
    for strategy in ("auto", *FORCED):
        if strategy == "expand" and segments.rows * case.rank > _EXPANDED_LIMIT:
            continue
        if strategy == "cached" and not case.folded_bytes:
            continue
        if strategy == "native" and not native_ops.available(dtype):
            continue
        modulator = Modulator(strategy, Autotuner() if strategy in {"auto", "native"} else None)
        modulator.folded = FoldedCache(case.folded_bytes, torch.device("cpu"))

        def run(modulator: Modulator = modulator) -> torch.Tensor:
            with modulator.planned(Plan(segments)):
                return modulator.linear(LayerCall("l", x, weight, slots, segments))

        sides[strategy] = run
        # The others need no more than to have what they keep.
        warm = 1 if report.quick else _WARM_CALLS if modulator.tuner is not None else 3
        for _ in range(warm):
            y = run()
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
