"""Pruning by magnitude: the smallest numbers of each factor become zero and stay so."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Pruning:
    """Which numbers of each factor are kept.

    Args:
        factors: Name → the trained tensor. They are pruned at once, in place.
        share: Of each tensor, 0 to 1, that becomes zero; rounded down to whole numbers.
    """

    def __init__(self, factors: Mapping[str, torch.nn.Parameter], share: float) -> None:
        self._factors = dict(factors)
        self._kept = {name: kept(one.detach(), share) for name, one in self._factors.items()}
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is not kept to zero again, in place: an optimizer's step has moved it."""
        for name, factor in self._factors.items():
            factor.mul_(self._kept[name])


def kept(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """Return a mask that is 0 for the `share` of the tensor smallest in magnitude, else 1.

    Args:
        tensor: Of any shape.
        share: 0 to 1; `floor(share · n)` numbers are masked, of equal ones the first.

    Raises:
        ValueError: A share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"found a share of {share}, expected 0 to 1")
    mask = torch.ones(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    order = tensor.abs().flatten().argsort(stable=True)
    mask[order[: int(share * tensor.numel())]] = 0
    return mask.view(tensor.shape)
