"""What one adapter brings to one layer: the two factors, and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters.signature import Method


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter brings to one layer.

    Args:
        method: ``hira`` or ``lora``.
        a: ``[r, in]``; of a convolution ``[r, in, *kernel]``; of an embedding ``[r, embeddings]``.
        b: ``[out, r]``; of a convolution ``[out, r, 1, ...]``.
        scale: LoRA's s; 1 for HiRA.
        bias: ``[out]``, which replaces the layer's own, or None.
    """

    method: Method
    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]
