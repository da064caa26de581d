"""A layer call in torch operators: every segment computed in the way chosen for it.

What all segments share is done once: W0 is dequantized when first needed, base rows that follow
each other are one matmul, and so are all expanded rows. The choice is ``adapters.modulation``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from adapters.kernels import torch_ops
from adapters.segments import Segment
from adapters.slot_factors import SlotFactors
from adapters.workspace import Workspace

# Expanded rows (row x rank) of one matmul: bounds the buffers of the expand strategy.
_EXPANDED_ROWS_LIMIT = 4096


@dataclass(slots=True)
class Work:
    """One segment and how it is computed.

    Args:
        part: Its rows.
        how: ``fold`` covers kept folded weights: where it comes from is ``Sources``'s business.
        bias: ``[out]``: the layer's or the adapter's own, or None.
        factors: In the compute dtype; None for ``base``.
    """

    part: Segment
    how: Literal["base", "lora", "expand", "fold"]
    bias: torch.Tensor | None
    factors: SlotFactors | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where weights come from: W0, and the folded weight of a segment, both ``[out, in]``."""

    base: Callable[[], torch.Tensor]
    folded: Callable[[Work], torch.Tensor]


def run_into(
    y: torch.Tensor, x: torch.Tensor, work: Sequence[Work], sources: Sources, workspace: Workspace
) -> None:
    """Every segment of ``work``; writes ``y`` ``[rows, out]`` from ``x`` ``[rows, in]``."""
    if any(item.how != "fold" for item in work):
        _run_thin(y, x, sources.base(), work, workspace)
    for item in work:
        if item.how == "fold":
            rows = slice(item.part.start, item.part.stop)
            torch_ops.linear_into(y[rows], x[rows], sources.folded(item), item.bias)


def _run_thin(
    y: torch.Tensor, x: torch.Tensor, w0: torch.Tensor, work: Sequence[Work], workspace: Workspace
) -> None:
    """All that needs x W0ᵀ: one matmul for each run of such rows, then the small products."""
    for (is_fold, _), group in groupby(work, key=lambda item: (item.how == "fold", id(item.bias))):
        run = list(group)
        if not is_fold:
            rows = slice(run[0].part.start, run[-1].part.stop)
            torch_ops.linear_into(y[rows], x[rows], w0, run[0].bias)
    for item in work:
        if item.how == "lora":
            assert item.factors is not None
            rows = slice(item.part.start, item.part.stop)
            factors = item.factors
            torch_ops.add_lora(y[rows], x[rows], factors.a, factors.b, factors.scale)
    pieces = [piece for item in work if item.how == "expand" for piece in _pieces(item)]
    while pieces:
        batch: list[_Piece] = []
        count = 0
        while pieces and (not batch or count + _expanded(pieces[0]) <= _EXPANDED_ROWS_LIMIT):
            piece = pieces.pop(0)
            batch.append(piece)
            count += _expanded(piece)
        _run_expand(y, x, w0, pieces=batch, count=count, workspace=workspace)


_Piece = tuple[int, int, SlotFactors]  # rows start to stop of one slot


def _pieces(item: Work) -> Iterator[_Piece]:
    assert item.factors is not None
    step = max(1, _EXPANDED_ROWS_LIMIT // item.factors.rank)
    for start in range(item.part.start, item.part.stop, step):
        yield start, min(start + step, item.part.stop), item.factors


def _expanded(piece: _Piece) -> int:
    return (piece[1] - piece[0]) * piece[2].rank


def _run_expand(
    y: torch.Tensor,
    x: torch.Tensor,
    w0: torch.Tensor,
    *,
    pieces: list[_Piece],
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
