"""The GPU kernels where there is no GPU: copies that Triton interprets, or that it compiles.

The interpreter truncates where a GPU rounds, so its float16 answers are compared, whose last bit is
small.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import adapters.kernels
from adapters.kernels import triton_tiles
from adapters.kernels.reference import modulated_linear
from adapters.kernels.triton_operands import FACTOR_COLUMNS, pack_weight
from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation.quant import QuantizedWeight
from adapters.segments import from_runs
from tests.stand.compiled import nvidia_tool
from tests.stand.tiny_models import quantize

SUM_ORDER_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Kernels:
    """A copy of each module of kernels."""

    tiles: ModuleType
    scratch: ModuleType
    row: ModuleType
    expanded: ModuleType


_MODULES = ("triton_ops", "triton_scratch", "triton_one_row", "triton_expanded")


def copies(patch: pytest.MonkeyPatch, *, interpret: bool) -> Kernels:
    """Copies of all modules, in place of the real ones for whoever imports these from now on."""
    if interpret:
        patch.setenv("TRITON_INTERPRET", "1")
    folder = Path(triton_tiles.__file__).parent
    found: list[ModuleType] = []
    for name in _MODULES:
        spec = importlib.util.spec_from_file_location(f"copy_of_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _put(patch, name, module)
        found.append(module)
    return Kernels(*found)


def put_interpreted(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """Put copies that were made to be interpreted in place of the real ones once more."""
    patch.setenv("TRITON_INTERPRET", "1")
    modules = (kernels.tiles, kernels.scratch, kernels.row, kernels.expanded)
    for name, module in zip(_MODULES, modules, strict=True):
        _put(patch, name, module)


def _put(patch: pytest.MonkeyPatch, name: str, module: ModuleType) -> None:
    patch.setitem(sys.modules, f"adapters.kernels.{name}", module)
    patch.setattr(adapters.kernels, name, module, raising=False)


@contextmanager
def interpreted() -> Iterator[Kernels]:
    """The kernels as the interpreter runs them, in place of those for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        yield copies(patch, interpret=True)


def compiled_copies(cache: Path) -> Iterator[Kernels]:
    """The kernels as they are compiled for a GPU, into a folder; skips where they cannot be."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set: triton itself was loaded to interpret, not compile")
    if not nvidia_tool("ptxas").is_file():
        pytest.skip("this triton carries no assembler for NVIDIA GPUs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        yield copies(patch, interpret=False)


def one_layer(
    shape: tuple[int, int] = (48, 256), dtype: torch.dtype = torch.float16
) -> tuple[AdaptedModel, AdaptedLinear]:
    """A model of one random layer, on the kernels."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype)
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    quantize(model, "nf4")
    adapted = inject(model, strategy="fused")
    layer: Any = adapted.layers["0"]
    return adapted, layer


def assert_relative(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """The largest error, relative to the largest of the truth, is within a tolerance."""
    error = (found.double() - truth.double()).abs().max() / truth.abs().max()
    assert error <= tolerance, f"relative error {float(error):.2e}"


class RandomLayer:
    """A random layer, its tables of addresses in float32, and the tensors that they name."""

    def __init__(self, shape: tuple[int, int], ranks: dict[int, int], kind: Any = "nf4") -> None:
        self.shape = shape
        quantized = QuantizedWeight.from_dense(torch.randn(shape) * 0.3, kind, double_quant=False)
        self.w0 = quantized.dequantize()
        assert quantized.scales is not None
        self.weight = pack_weight(quantized.stored, quantized.scales, kind, shape, quantized.block)
        self.factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.addresses = torch.zeros(max(ranks, default=0) + 1, 2, FACTOR_COLUMNS).long()
        for slot, rank in ranks.items():
            a, b_t = torch.randn(rank, shape[1]), torch.randn(rank, shape[0]) / rank**0.5
            self.factors[slot] = (a, b_t.t())
            row = torch.tensor([a.data_ptr(), b_t.data_ptr(), rank])
            self.addresses[slot, 1] = row

    def truth(self, x: torch.Tensor, runs: list[tuple[int, int]], bias: Any) -> torch.Tensor:
        slots: Any = {s: ("hira", a, b, 1.0, None) for s, (a, b) in self.factors.items()}
        return modulated_linear(x, self.w0, slots, from_runs(runs), bias)


def filled_with_nan(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A buffer: what it held must not matter."""
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_exact(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Float32 answers differ from float64 by the order of their sums alone."""
    error = (found.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)
    assert error <= SUM_ORDER_TOLERANCE, f"relative error {error:.2e}"
