"""Random adapters for the comparisons that are made before anybody is answered."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import AdaptedModel
from adapters.modulation.slot_factors import SlotFactors
from adapters.signature import Method


def probe_factors(
    adapted: AdaptedModel,
    seed: int,
    method: Method,
    rank: int,
    *,
    dtype: torch.dtype,
    serves: Callable[[str], bool] = lambda _: True,
) -> dict[str, SlotFactors]:
    """A small random adapter of the linear layers, but for output layers.

    Args:
        adapted: Whose layers.
        seed: Equal seeds give equal numbers.
        method, rank: Of the adapter.
        dtype: Of the factors.
        serves: Of which paths.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, SlotFactors] = {}
    for path, layer in adapted.layers.items():
        if not isinstance(layer, AdaptedLinear) or layer.is_output or not serves(path):
            continue
        a = torch.randn(rank, layer.in_features, generator=generator)
        b_t = torch.randn(rank, layer.out_features, generator=generator) * 0.3
        a, b_t = (one.to(adapted.device, dtype) for one in (a, b_t))
        found[path] = SlotFactors(method, a, b_t.t())
    return found
