"""A layer call in torch operators: every segment computed in the way chosen for it.

What all segments share is done once: W0 is dequantized when first needed, base rows that follow
each other are one matmul, and so are all expanded rows. The choice is
``adapters.modulation.modulator``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from adapters.kernels import torch_ops
from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import Computation
from adapters.modulation.workspace import Workspace
from adapters.segments import Segment

# Expanded rows (row x rank) of one matmul: bounds the buffers of the expand strategy.
_EXPANDED_ROWS_LIMIT = 4096


@dataclass(slots=True)
class _Work:
    """One segment, how it is computed, its bias, and its factors in the compute dtype."""

    part: Segment
    way: Computation
    bias: torch.Tensor | None
    factors: SlotFactors | None

    @property
    def rows(self) -> slice:
        return slice(self.part.start, self.part.stop)

    @property
    def is_thin(self) -> bool:
        """Whether it needs x W0ᵀ: all but what is multiplied by a folded weight."""
        return self.way in ("base", "expand")


class Weights:
    """W0 of one call, dequantized when first needed: a call may do with folded weights alone."""

    def __init__(self, call: LayerCall, workspace: Workspace, folded: FoldedCache) -> None:
        self._call = call
        self._workspace = workspace
        self._cache = folded
        self._base: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        """W0 ``[out, in]`` in the compute dtype; never write to it."""
        if self._base is None:
            self._base = self._workspace.dequantized(self._call.weight, self._call.x.dtype)
        return self._base

    def folded(self, slot: int, factors: SlotFactors, way: Computation) -> torch.Tensor:
        """W0 ⊙ (1 + BA) of a slot: kept, kept from now on, or in a buffer of the moment.

        Valid until the next call of this.
        """
        if way == "kept":
            kept = self._cache.get(slot, self._call.path)
            if kept is None or kept.dtype != self._call.x.dtype:
                kept = self.keep(slot, factors)
            if kept is not None:
                return kept
        x, shape = self._call.x, self._call.weight.shape
        room = self._workspace.take("folded", shape, x.dtype, x.device)
        if way != "held":
            torch_ops.fold_into(room, self.base, factors.a, factors.b)
        return room

    def keep(self, slot: int, factors: SlotFactors, saving_ns: float = 0.0) -> torch.Tensor | None:
        """Fold the weight of a slot and keep it; None where it does not fit the budget."""
        path, dtype = self._call.path, self._call.x.dtype
        room = self._cache.reserve(slot, path, self._call.weight.shape, dtype, saving_ns)
        if room is None:
            return None
        try:
            torch_ops.fold_into(room, self.base, factors.a, factors.b)
        except BaseException:
            # What was reserved holds nothing yet; a later call must not find it.
            self._cache.discard(slot, path)
            raise
        return room


def run_torch(
    call: LayerCall, ways: Sequence[Computation], workspace: Workspace, folded: FoldedCache
) -> torch.Tensor:
    """A new ``[rows, out]``; ``kept`` of what is not there yet keeps it, where it fits.

    Args:
        call: On any device.
        ways: Of each segment.
        workspace: Its buffers are overwritten.
        folded: The kept folded weights.
    """
    weights = Weights(call, workspace, folded)
    work = [
        _work(part, factors, way, call)
        for part, factors, way in zip(call.segments.parts, call.factors, ways, strict=True)
    ]
    if all(item.factors is None for item in work):
        return F.linear(call.x, weights.base, call.bias)
    y = call.new_output()
    if any(item.is_thin for item in work):
        _run_thin(y, call.x, weights.base, work, workspace)
    for item in work:
        if not item.is_thin:
            assert item.factors is not None
            weight = weights.folded(item.part.slot, item.factors, item.way)
            torch_ops.linear_into(y[item.rows], call.x[item.rows], weight, item.bias)
    return y


def _work(part: Segment, factors: SlotFactors | None, way: Computation, call: LayerCall) -> _Work:
    if factors is None:
        return _Work(part, "base", call.bias, None)
    factors = factors.to(call.x.dtype)
    bias = call.bias if factors.bias is None else factors.bias
    return _Work(part, way, bias, factors)


def _run_thin(
    y: torch.Tensor, x: torch.Tensor, w0: torch.Tensor, work: Sequence[_Work], workspace: Workspace
) -> None:
    """All that needs x W0ᵀ: one matmul for each run of such rows, then the small products."""
    for (is_thin, _), group in groupby(work, key=lambda item: (item.is_thin, id(item.bias))):
        run = list(group)
        if is_thin:
            rows = slice(run[0].part.start, run[-1].part.stop)
            torch_ops.linear_into(y[rows], x[rows], w0, run[0].bias)
    for item in work:
        own = item.factors
        if own is not None and own.method == "lora":
            torch_ops.add_lora(y[item.rows], x[item.rows], own.a, own.b, own.scale)
    pieces = [piece for item in work if item.way == "expand" for piece in _slot_rows(item)]
    while pieces:
        batch: list[_SlotRows] = []
        count = 0
        while pieces and (not batch or count + _expanded(pieces[0]) <= _EXPANDED_ROWS_LIMIT):
            piece = pieces.pop(0)
            batch.append(piece)
            count += _expanded(piece)
        _run_expand(y, x, w0, pieces=batch, count=count, workspace=workspace)


_SlotRows = tuple[int, int, SlotFactors]  # rows start to stop of one slot


def _slot_rows(item: _Work) -> Iterator[_SlotRows]:
    assert item.factors is not None
    step = max(1, _EXPANDED_ROWS_LIMIT // item.factors.rank)
    for start in range(item.part.start, item.part.stop, step):
        yield start, min(start + step, item.part.stop), item.factors


def _expanded(piece: _SlotRows) -> int:
    return (piece[1] - piece[0]) * piece[2].rank


def _run_expand(
    y: torch.Tensor,
    x: torch.Tensor,
    w0: torch.Tensor,
    *,
    pieces: list[_SlotRows],
    count: int,
    workspace: Workspace,
) -> None:
    z = workspace.take("expanded_in", (count, w0.shape[1]), x.dtype, x.device)
    e = workspace.take("expanded_out", (count, w0.shape[0]), x.dtype, x.device)
    offset = 0
    for piece in pieces:
        start, stop, factors = piece
        torch_ops.expand_into(z[offset : offset + _expanded(piece)], x[start:stop], factors.a)
        offset += _expanded(piece)
    torch.mm(z, w0.t(), out=e)
    offset = 0
    for piece in pieces:
        start, stop, factors = piece
        torch_ops.add_contracted(y[start:stop], e[offset : offset + _expanded(piece)], factors.b)
        offset += _expanded(piece)
