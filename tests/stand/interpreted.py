"""The GPU kernels where there is no GPU: copies that Triton interprets, or that it compiles.

The interpreter truncates where a GPU rounds, so its float16 answers are compared, whose last bit is
small.
"""

from __future__ import annotations

import importlib.util
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
from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import AdaptedModel, inject
from tests.stand.tiny_models import quantize


@dataclass(frozen=True, slots=True)
class Kernels:
    """A copy of each module of kernels."""

    tiles: ModuleType
    scratch: ModuleType
    row: ModuleType


def copies(patch: pytest.MonkeyPatch, *, interpret: bool) -> Kernels:
    """Copies of all modules, in place of the real ones for whoever imports these from now on."""
    if interpret:
        patch.setenv("TRITON_INTERPRET", "1")
    folder = Path(triton_tiles.__file__).parent
    found: list[ModuleType] = []
    for name in ("triton_ops", "triton_scratch", "triton_one_row"):
        spec = importlib.util.spec_from_file_location(f"copy_of_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(sys.modules, f"adapters.kernels.{name}", module)
        patch.setattr(adapters.kernels, name, module, raising=False)
        found.append(module)
    return Kernels(*found)


@contextmanager
def interpreted() -> Iterator[Kernels]:
    """The kernels as the interpreter runs them, in place of those for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        yield copies(patch, interpret=True)


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
