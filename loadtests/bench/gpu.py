"""On a GPU: layers in every form of the kernels, whole steps, prompts, texts, and stock peers.

NF4 layers with HiRA first, then the engine (``gpu_engine``) and the encode lane (``gpu_encode``);
at most five minutes in all.

Says so and skips where there is no GPU, or where the kernel cannot run. The sides run on one
stream; each sample ends with a synchronization. The first side's answer is held to float64 before
anything is timed.
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
from adapters.modulation.fused import obstacle
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import Segments, from_rows
from loadtests.bench import gpu_encode, gpu_engine
from loadtests.bench.timing import Budget, Figure, Report, alternate

_CALLS = 20  # of one sample: a launch is shorter than what a clock tells well
_AGREEMENT = 1e-2


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and a batch; what it is held against, and the speed to reach."""

    rows: int
    adapters: int
    out: int = 4096
    inputs: int = 4096
    rank: int = 32
    against: str = ""
    at_least: float | None = None

    @property
    def name(self) -> str:
        return f"{self.out} x {self.inputs}, r {self.rank}, {self.rows} / {self.adapters}"


CASES = (
    Case(1, 1),
    Case(16, 1),
    Case(16, 16, against="dequantize, fold, matmul", at_least=5.0),
    Case(64, 8),
    Case(64, 64),
    Case(256, 8),
    Case(1024, 8, against="dense bf16 matmul", at_least=1 / 1.5),
    Case(1024, 64),
    Case(4096, 16),
    Case(16, 16, rank=8),
    Case(16, 16, rank=128),
    Case(1, 1, out=14336),
    Case(16, 16, out=14336),
    Case(1024, 8, out=14336),
    Case(16, 16, out=1024),
)


def bench(report: Report) -> None:
    """Run all cases, or say why none is run."""
    report.section("GPU: layers, NF4, bfloat16, HiRA; out x in, rank, rows / adapters")
    if not torch.cuda.is_available():
        print("no GPU: skipped")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    reason = obstacle(torch.bfloat16, device)
    print(f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    if reason is not None:
        print(f"the fused kernel cannot run here: {reason}; skipped")
        return
    budget = Budget(0.0, 1, 1) if report.quick else Budget(2.0, 5, 40)
    report.machine = {
        **report.machine,
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
    }
    with torch.inference_mode():
        for case in CASES:
            _measure(case, device, budget, report)
    for shape in gpu_engine.SHAPES[: 1 if report.quick else None]:
        report.section(f"GPU: steps of a {shape.name} Llama shape")
        gpu_engine.measure(report, shape, device)
    report.section("GPU: texts, BERT-base shape")
    gpu_encode.measure(report, device)


def _measure(case: Case, device: torch.device, budget: Budget, report: Report) -> None:
    torch.manual_seed(0)
    sides, truth = _sides(case, device)
    found = sides["fused"]()
    error = float((found.double() - truth).abs().max() / truth.abs().max())
    if error > _AGREEMENT:
        raise SystemExit(f"{case.name}: off float64 by {error:.2g}")
    samples = alternate({name: _timed(side) for name, side in sides.items()}, budget)
    micro = {name: samples.median(name) / _CALLS * 1e6 for name in sides}
    flops = 2 * case.rows * case.out * case.inputs
    factors = case.adapters * case.rank * (case.out + case.inputs)
    bytes_read = case.out * case.inputs * 0.5625 + factors * 2
    report.add(
        Figure(
            "gpu",
            case.name,
            "fused",
            micro["fused"],
            unit="us",
            note=f"{flops / micro['fused'] / 1e6:.0f} TFLOP/s of x W0, "
            f"{bytes_read / micro['fused'] / 1e3:.0f} GB/s of W0, A and B; "
            f"off float64 by {error:.1g}",
        )
    )
    for name in sides:
        if name != "fused":
            goal = case.at_least if name == case.against else None
            speed = samples.speed("fused", name)
            note = f"{micro[name]:.1f} us"
            report.add(
                Figure("gpu", case.name, f"speed of {name}", speed, at_least=goal, note=note)
            )


def _sides(
    case: Case, device: torch.device
) -> tuple[Mapping[str, Callable[[], torch.Tensor]], torch.Tensor]:
    import bitsandbytes as bnb

    dense = nn.Linear(case.inputs, case.out, bias=False, dtype=torch.bfloat16)
    weight = dense.weight.to(device)
    models = []
    for strategy in ("fused", "fold"):
        layer: Any = bnb.nn.Linear4bit(
            case.inputs, case.out, False, compress_statistics=False, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            dense.weight.detach().clone(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            module=layer,
        ).to(device)
        holder = nn.Sequential(layer)
        # A model of 4-bit weights alone would not tell the compute dtype.
        holder.append(nn.LayerNorm(1, dtype=torch.bfloat16, device=device))
        holder.get_output_embeddings = lambda: None  # type: ignore[assignment]
        models.append(inject(holder, strategy=strategy))
    factors = [_factors(case, seed, device) for seed in range(case.adapters)]
    for adapted in models:
        for slot, one in enumerate(factors, start=1):
            adapted.install(slot, {"0": one})
    segments = from_rows(row * case.adapters // case.rows + 1 for row in range(case.rows))
    x = torch.randn(case.rows, case.inputs, device=device, dtype=torch.bfloat16)
    layers: Sequence[Any] = [adapted.layers["0"] for adapted in models]

    def run(number: int) -> torch.Tensor:
        with models[number].batch(segments):
            y: torch.Tensor = layers[number](x)
        return y

    w0 = layers[1].quantized.dequantize(dtype=torch.float32)
    slots: Any = {slot: ("hira", f.a, f.b, 1.0, None) for slot, f in enumerate(factors, start=1)}
    truth = modulated_linear(x, w0, slots, segments, None)
    forms = _forms(models[0], segments, x)
    return {
        "fused": lambda: run(0),
        **forms,
        "dense bf16 matmul": lambda: F.linear(x, weight),
        "dequantize, fold, matmul": lambda: run(1),
    }, truth


def _forms(
    adapted: Any, segments: Segments, x: torch.Tensor
) -> Mapping[str, Callable[[], torch.Tensor]]:
    """The other forms of the kernels for the layer "0" of a model, each alone."""
    layer = adapted.layers["0"]
    call = LayerCall("0", x, layer.quantized, layer.slots, segments, None)
    runs = adapted.fused.forms(call)
    return {f"{way} alone": run for (_, way), run in runs.items() if way != "tiles"}


def _factors(case: Case, seed: int, device: torch.device) -> SlotFactors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(case.rank, case.inputs, generator=generator)
    b = torch.randn(case.out, case.rank, generator=generator) * (0.3 / case.rank**0.5)
    return SlotFactors("hira", a.to(device, torch.bfloat16), b.to(device, torch.bfloat16))


def _timed(side: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_CALLS):
            side()
        torch.cuda.synchronize()

    return run
