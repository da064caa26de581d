"""Folded weights kept between calls, within a budget of bytes.

A folded weight W0 ⊙ (1 + B A) belongs to one slot and one layer and is dropped with its slot. It is
full size in the compute dtype, so few are worth their bytes; which rows use one is decided by
``adapters.modulation``.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from threading import Lock
from typing import Protocol

import torch


class FoldedWeights(Protocol):
    """Where folded weights are kept between calls; ``FoldedCache``, or a test's."""

    def has(self, slot: int, layer: str) -> bool:
        """Whether ``get`` would find it."""

    def get(self, slot: int, layer: str) -> torch.Tensor | None:
        """The folded weight ``[out, in]``, or None; counts as a use."""

    def reserve(
        self, slot: int, layer: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Room for one, for the caller to fill at once; None if it is not worth its bytes."""

    def discard(self, slot: int, layer: str) -> None:
        """Drop one, if it is there."""

    def forget(self, slot: int) -> None:
        """Drop everything of ``slot``."""


class FoldedCache:
    """Folded weights by slot and layer, least recently used out first; never above the budget.

    Args:
        budget_bytes: Of all weights kept; 0 keeps none.
        device: Where they are.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self.device = device
        self._kept: OrderedDict[tuple[int, str], torch.Tensor] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()  # slots are emptied by the loader's thread

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, slot: int, layer: str) -> bool:
        """Whether ``get`` would find it; counts as no use."""
        return (slot, layer) in self._kept

    def get(self, slot: int, layer: str) -> torch.Tensor | None:
        """The folded weight ``[out, in]``, or None; counts as a use."""
        with self._lock:
            weight = self._kept.get((slot, layer))
            if weight is not None:
                self._kept.move_to_end((slot, layer))
            return weight

    def reserve(
        self, slot: int, layer: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Room for one, for the caller to fill before its next call; None if it cannot fit.

        Others go to make room, so do not hold one from ``get`` across this call.
        """
        need = prod(shape) * dtype.itemsize
        if need > self.budget_bytes:
            return None
        with self._lock:
            self._drop((slot, layer))
            while self._nbytes + need > self.budget_bytes:
                self._drop(next(iter(self._kept)))
            with torch.inference_mode(False):
                weight = torch.empty(shape, dtype=dtype, device=self.device)
            self._kept[slot, layer] = weight
            self._nbytes += need
        return weight

    def discard(self, slot: int, layer: str) -> None:
        """Drop one, if it is there."""
        with self._lock:
            self._drop((slot, layer))

    def forget(self, slot: int) -> None:
        """Drop everything of ``slot``."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == slot]:
                self._drop(key)

    def _drop(self, key: tuple[int, str]) -> None:
        weight = self._kept.pop(key, None)
        if weight is not None:
            self._nbytes -= weight.nbytes
