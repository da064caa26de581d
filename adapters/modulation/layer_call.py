"""One call of one linear layer: all that a strategy needs to compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import Segment, Segments


@dataclass(frozen=True, slots=True)
class LayerCall:
    """y[rows of s] = x[rows of s] · (W0 ⊙ (1 + B_s A_s))ᵀ + bias, for every segment s.

    LoRA segments get x W0ᵀ + s (x Aᵀ) Bᵀ + bias; slots without factors here the bare base.

    Args:
        path: Of the layer.
        x: ``[rows, in]``, in the dtype to compute in.
        weight: W0 ``[out, in]``.
        slots: Factors of this layer by slot, in any dtype. Changed by ``AdaptedModel.install`` and
            ``uninstall`` only, which say so to the modulator.
        segments: Cover the rows of ``x``.
        bias: ``[out]`` in the dtype of ``x``, or None; a slot's own bias takes its place.
    """

    path: str
    x: torch.Tensor
    weight: QuantizedWeight
    slots: Mapping[int, SlotFactors]
    segments: Segments
    bias: torch.Tensor | None = None

    @property
    def factors(self) -> list[SlotFactors | None]:
        """Of each segment; None for the bare base."""
        return [self.slots.get(part.slot) for part in self.segments.parts]

    def new_output(self) -> torch.Tensor:
        """An uninitialized ``[rows, out]``, which overlaps no buffer."""
        return self.x.new_empty(self.x.shape[0], self.weight.shape[0])

    def of_segments(self, places: Sequence[int]) -> LayerCall:
        """The call for some of the segments alone, by their numbers; copies their rows."""
        chosen = [self.segments.parts[place] for place in places]
        rows = torch.cat([self.x[part.start : part.stop] for part in chosen])
        parts: list[Segment] = []
        start = 0
        for part in chosen:
            parts.append(Segment(part.slot, start, start + part.rows))
            start += part.rows
        segments = Segments(tuple(parts))
        return LayerCall(self.path, rows, self.weight, self.slots, segments, self.bias)
