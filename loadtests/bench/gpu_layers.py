"""One NF4 layer with HiRA on a device: every form of the kernels, dense and bitsandbytes products.

Our forms' answers are held to float64 before anything is timed; one that is wrong is not timed.
"graph" is replayed from a CUDA graph, so without the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adapters.kernels.reference import modulated_linear
from adapters.layers.inject import inject
from adapters.modulation.autotune import Autotuner
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import Segments, from_rows
from loadtests.bench.on_device import graph_of, repeated
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Budget, Figure, Report, alternate

_CALLS = 20  # of one sample
_AGREEMENT = 1e-2  # beyond it a form is wrong
_MOST_ERROR = 5e-3
# A card's bytes and operations in a microsecond, for the floor: H200, copy and dense bfloat16.
_BYTES_A_US = 4.3e6
_FLOPS_A_US = 790e6


@dataclass(frozen=True, slots=True)
class LayerCase:
    """A layer and a batch, and the time to stay under.

    Args:
        rows, adapters: Of the batch.
        out, inputs, rank: Of the layer and of its adapters.
        at_most_us: From a graph, by the fastest form.
        at_most_dense: Likewise, against the dense product.
    """

    rows: int
    adapters: int
    out: int = 4096
    inputs: int = 4096
    rank: int = 32
    at_most_us: float | None = None
    at_most_dense: float | None = None

    @property
    def name(self) -> str:
        return f"{self.out} x {self.inputs}, r {self.rank}, {self.rows} / {self.adapters}"

    @property
    def floor_us(self) -> float:
        """By bytes, or by the operations of the product and of BA."""
        factors = self.adapters * self.rank * (self.out + self.inputs)
        moved = self.out * self.inputs * 0.5625 + 2 * factors
        moved += 2 * self.rows * (self.out + self.inputs)
        flops = 2 * self.out * self.inputs * (self.rows + self.adapters * self.rank)
        return max(moved / _BYTES_A_US, flops / _FLOPS_A_US)


# The most telling first: what does not fit into the time is left out from the end.
LAYER_CASES = (
    LayerCase(16, 16, at_most_us=50.0),
    LayerCase(1, 1, at_most_us=12.0),
    LayerCase(16, 16, out=14336, at_most_us=160.0),
    LayerCase(64, 64, at_most_us=200.0),
    LayerCase(1024, 8, at_most_dense=1.5),
    LayerCase(16, 1),
    LayerCase(64, 8),
    LayerCase(256, 8),
    LayerCase(1024, 64),
    LayerCase(4096, 16),
    LayerCase(1, 1, out=14336),
    LayerCase(1024, 8, out=14336),
    LayerCase(16, 16, rank=8),
    LayerCase(16, 16, rank=128),
    LayerCase(16, 16, out=1024),
)
TINY_LAYERS = (LayerCase(40, 2, 64, 128, 4, 1e6, 1e6),)


def measure_layers(
    report: Report, cases: Sequence[LayerCase], device: torch.device, clock: PartClock
) -> None:
    """Alternate all sides over every case that the time holds."""
    budget = Budget(0.0, 1, 1) if report.quick else Budget(0.8, 3, 20)
    with torch.inference_mode():
        for case in cases:
            if clock.has_time(case.name):
                _measure_case(report, case, device, budget)


def _measure_case(report: Report, case: LayerCase, device: torch.device, budget: Budget) -> None:
    torch.manual_seed(0)
    sides, truth = _sides(case, device)
    errors: dict[str, float] = {}
    for name in [name for name in sides if name in ("as served", *_FORMS)]:
        error = float((sides[name]().double() - truth).abs().max() / truth.abs().max())
        if error <= _AGREEMENT:
            errors[name] = error
        else:
            report.leave_out(f"layers: {case.name}: {name}: off float64 by {error:.2g}")
            del sides[name]
    timed: dict[str, Callable[[], None]] = {}
    for name, side in sides.items():
        timed[name] = repeated(side, device, _CALLS)
        if name == "as served" and device.type == "cuda":
            continue  # it may time its forms at any call
        try:
            timed[f"{name}, graph"] = graph_of(side, device, _CALLS)
        except RuntimeError as error:
            report.leave_out(f"layers: {case.name}: {name} as a graph: {str(error)[:100]}")
    samples = alternate(timed, budget)
    micro = {name: samples.median(name) / _CALLS * 1e6 for name in timed}

    def add(what: str, value: float, unit: str, goal: float | None = None, note: str = "") -> None:
        report.add(Figure("gpu", case.name, what, value, unit, at_most=goal, note=note))

    for name, value in micro.items():
        plain = name.removesuffix(", graph")
        add(
            name, value, "us", note=f"off float64 by {errors[plain]:.1g}" if plain in errors else ""
        )
    if errors:
        add("largest error", max(errors.values()), "of the largest", _MOST_ERROR)
    ours = [f"{name}, graph" for name in errors if f"{name}, graph" in micro]
    if ours:
        fastest = min(ours, key=micro.__getitem__)
        add("fastest form, graph", micro[fastest], "us", case.at_most_us, fastest)
        dense = f"{_DENSE}, graph"
        if dense in micro:
            share = micro[fastest] / micro[dense]
            add("fastest form against dense", share, "of its time", case.at_most_dense)
    report.add(Figure("gpu", case.name, "floor of an H200", case.floor_us, unit="us"))


_DENSE = "dense bf16 matmul"
_FORMS = ("tiles", "wide", "product", "expanded", "scratch", "row")


def _sides(
    case: LayerCase, device: torch.device
) -> tuple[dict[str, Callable[[], torch.Tensor]], torch.Tensor]:
    import bitsandbytes as bnb

    weight = torch.randn(case.out, case.inputs, device=device, dtype=torch.bfloat16) * 0.02
    layer: Any = bnb.nn.Linear4bit(
        case.inputs, case.out, False, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False,
        module=layer,
    ).to(device)  # fmt: skip
    packed, state = layer.weight.data.clone(), layer.weight.quant_state
    holder: Any = nn.Sequential(layer)
    # A model of 4-bit weights alone would not tell the compute dtype.
    holder.append(nn.LayerNorm(1, dtype=torch.bfloat16, device=device))
    holder.get_output_embeddings = lambda: None
    adapted = inject(holder)
    adapted.modulator.tuner = Autotuner()
    factors = [_factors(case, seed, device) for seed in range(case.adapters)]
    for slot, one in enumerate(factors, start=1):
        adapted.install(slot, {"0": one})
    segments = from_rows(row * case.adapters // case.rows + 1 for row in range(case.rows))
    x = torch.randn(case.rows, case.inputs, device=device, dtype=torch.bfloat16)
    served: Any = adapted.layers["0"]

    def run() -> torch.Tensor:
        with adapted.batch(segments):
            y: torch.Tensor = served(x)
        return y

    w0 = served.quantized.dequantize(dtype=torch.float32)
    slots: Any = {slot: ("hira", f.a, f.b, 1.0, None) for slot, f in enumerate(factors, start=1)}
    truth = modulated_linear(x, w0, slots, segments, None)
    return {
        "as served": run,
        **_forms(adapted, segments, x),
        _DENSE: lambda: F.linear(x, weight),
        "bitsandbytes 4-bit, no adapter": lambda: bnb.matmul_4bit(x, packed.t(), state),
    }, truth


def _forms(
    adapted: Any, segments: Segments, x: torch.Tensor
) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Every form of the kernels for the layer "0" of a model, each alone; {} without kernels."""
    if adapted.fused is None:
        return {}
    layer = adapted.layers["0"]
    call = LayerCall("0", x, layer.quantized, layer.slots, segments, None)
    return {way: run for (_, way), run in adapted.fused.forms(call).items()}


def _factors(case: LayerCase, seed: int, device: torch.device) -> SlotFactors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(case.rank, case.inputs, generator=generator)
    b = torch.randn(case.out, case.rank, generator=generator) * (0.3 / case.rank**0.5)
    return SlotFactors("hira", a.to(device, torch.bfloat16), b.to(device, torch.bfloat16))
