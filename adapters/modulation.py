"""Which rows of a batch are computed how: the exact strategies, their choice and their buffers.

    base      y = x W0ᵀ + b                                   rows of slots without factors here
    lora      base + s (x Aᵀ) Bᵀ                              every LoRA segment
    fold      y = x (W0 + W0 ⊙ BA)ᵀ + b                       W0 dequantized once per call
    expand    base + Σ_k b_k ⊙ (W0 (a_k ⊙ x))                 few rows; all of them in one matmul
    cached    fold, with the folded weight kept between calls
    native    all of these in one pass over W0, by the compiled CPU kernel, in bfloat16
    fused     all but lora in one pass over W0, by the GPU kernel: ``adapters.fused``
    reference float64, as the equations are written

The arithmetic is in ``adapters.kernels``; layers and residency bring weights, factors and cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F

from adapters.folded import FoldedCache, FoldedWeights
from adapters.kernels import native_ops, reference, torch_ops
from adapters.plan import Plan
from adapters.quant import QuantizedWeight
from adapters.segments import BASE_SLOT, Segment, Segments, from_runs
from adapters.slot_factors import SlotFactors
from adapters.workspace import Workspace

__all__ = [
    "STRATEGIES",
    "FoldedWeights",
    "Modulator",
    "SlotFactors",
    "Strategy",
    "Workspace",
    "modulated_linear",
]

Strategy = Literal["auto", "fold", "expand", "cached", "native", "fused", "reference"]
STRATEGIES: tuple[Strategy, ...] = (
    "auto",
    "fold",
    "expand",
    "cached",
    "native",
    "fused",
    "reference",
)

# Expanded rows (row x rank) of one matmul: bounds the buffers of the expand strategy.
_EXPANDED_ROWS_LIMIT = 4096
# Up to this many expanded rows of a segment, expanding beats folding; see the cost model.
_EXPAND_ROWS_PER_SEGMENT = 64

# Up to this many rows of a bare base layer the compiled kernel beats dequantizing and a matmul.
_NATIVE_BASE_ROWS = 768


class Modulator:
    """The state that all layers of one model share: the strategy, the buffers, the current plan.

    One thread runs forwards; nothing here is guarded against two.
    """

    def __init__(self, strategy: Strategy = "auto") -> None:
        self.strategy: Strategy = strategy
        self.workspace = Workspace()
        self.folded: FoldedWeights = FoldedCache(0, torch.device("cpu"))
        self.plan: Plan | None = None
        self._bounds: tuple[Segments, bytes] = (Segments(()), b"")  # of the latest native call

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[None]:
        """Make ``plan`` current; what was current before comes back."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def base_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
        """W0 in ``dtype``, in a buffer that the next layer overwrites. Never write to it."""
        if weight.is_ready(dtype):
            return weight.dequantize(dtype=dtype)
        return weight.dequantize(self.workspace.take("w0", weight.shape, dtype, weight.device))

    def base_linear(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x W0ᵀ + bias, by the faster of the compiled kernel and torch: ``[..., out]``."""
        if weight.kind in ("nf4", "fp4") and self.runs_native(x, bias):
            rows = x.reshape(-1, x.shape[-1])
            if 0 < rows.shape[0] <= _NATIVE_BASE_ROWS:
                every = from_runs([(BASE_SLOT, rows.shape[0])])
                y = _run_native(rows, weight, {}, every, bias, modulator=self)
                if y is not None:
                    return y.view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, self.base_weight(weight, x.dtype), bias)

    def bounds_of(self, segments: Segments) -> bytes:
        """``native_ops.pack_bounds``, made once for the many layers of a forward."""
        if self._bounds[0] is not segments:
            self._bounds = (segments, native_ops.pack_bounds(segments))
        return self._bounds[1]

    def runs_native(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the compiled kernel is wanted, there, and takes these rows."""
        return (
            self.strategy in ("auto", "native")
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and native_ops.available()
            and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
        )

    def linear(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        slots: Mapping[int, SlotFactors],
        segments: Segments,
        bias: torch.Tensor | None,
        *,
        layer: str,
    ) -> torch.Tensor:
        """``modulated_linear`` with this model's strategy, buffers and cache."""
        return modulated_linear(x, weight, slots, segments, bias, modulator=self, layer=layer)


def modulated_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: Mapping[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None = None,
    *,
    modulator: Modulator,
    layer: str = "",
) -> torch.Tensor:
    """y[rows of s] = x[rows of s] · (W0 ⊙ (1 + B_s A_s))ᵀ + bias, for every segment s in one call.

    LoRA segments get x W0ᵀ + s (x Aᵀ) Bᵀ + bias; slots without factors here the bare base.

    Args:
        x: ``[rows, in]``, in the dtype to compute in.
        weight: W0 ``[out, in]``.
        slots: Factors of this layer by slot, in any dtype.
        segments: Cover the rows of ``x``.
        bias: ``[out]`` in the dtype of ``x``, or None.
        modulator: The strategy, the buffers and the cache of folded weights; its buffers are
            overwritten.
        layer: The key of this layer in the cache.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``, not overlapping any buffer.

    Raises:
        SegmentMismatch: The segments do not cover the rows; checked before any write.
    """
    segments.check_covers(x.shape[0])
    if modulator.strategy == "reference":
        return _reference(x, weight, slots, segments, bias)
    if segments.parts and modulator.runs_native(x, bias):
        done = _run_native(x, weight, slots, segments, bias, modulator=modulator)
        if done is not None:
            return done
    work = [
        _assign(part, slots, dtype=x.dtype, bias=bias, modulator=modulator, layer=layer)
        for part in segments.parts
    ]
    y = x.new_empty(x.shape[0], weight.shape[0])
    base = _Base(weight, x.dtype, modulator)
    if any(item.how != "fold" for item in work):
        _run_thin(y, x, base.weight(), work, modulator.workspace)
    for item in work:
        if item.how == "fold":
            rows = slice(item.part.start, item.part.stop)
            folded = _folded(item, base, modulator, layer)
            torch_ops.linear_into(y[rows], x[rows], folded, item.bias)
    return y


def _run_native(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: Mapping[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None,
    *,
    modulator: Modulator,
) -> torch.Tensor | None:
    """The call by the compiled kernel; None, and nothing is written, where it cannot do all of it.

    LoRA's rows are base rows to it; their two thin products are added afterwards.
    """
    out_features, in_features = weight.shape
    if in_features % native_ops.INPUTS_MULTIPLE:
        return None
    records = []
    lora: list[tuple[Segment, SlotFactors]] = []
    for part in segments.parts:
        factors = slots.get(part.slot)
        if factors is None:
            records.append(native_ops.BASE_RECORD)
            continue
        if not factors.native_record:
            return None
        records.append(factors.native_record)
        if factors.method == "lora":
            lora.append((part, factors))
    stored, kind, block = weight.stored, weight.kind, weight.block
    if not native_ops.takes_weight(kind, weight.shape, block):
        stored, kind, block = modulator.base_weight(weight, x.dtype), "dense", 0
        if not stored.is_contiguous():
            return None
    workspace, device = modulator.workspace, x.device
    x = x.contiguous()
    y = x.new_empty(x.shape[0], out_features)
    native_ops.linear_into(
        y,
        x,
        stored=stored,
        scales=weight.scales,
        kind=kind,
        block=block,
        bias=bias,
        bounds=modulator.bounds_of(segments),
        records=b"".join(records),
        scratch=lambda count: workspace.whole("native", count, torch.uint8, device),
    )
    for part, factors in lora:
        rows = slice(part.start, part.stop)
        torch_ops.add_lora(y[rows], x[rows], factors.a, factors.b, factors.scale)
    return y


@dataclass(slots=True)
class _Base:
    """W0 of one call, dequantized when first needed: a call may do with folded weights alone."""

    stored: QuantizedWeight
    dtype: torch.dtype
    modulator: Modulator
    dense: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        if self.dense is None:
            self.dense = self.modulator.base_weight(self.stored, self.dtype)
        return self.dense


@dataclass(slots=True)
class _Work:
    """One segment and how it is computed."""

    part: Segment
    how: Literal["base", "lora", "expand", "fold"]
    bias: torch.Tensor | None
    factors: SlotFactors | None = None


def _assign(
    part: Segment,
    slots: Mapping[int, SlotFactors],
    *,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    modulator: Modulator,
    layer: str,
) -> _Work:
    factors = slots.get(part.slot)
    if factors is None:
        return _Work(part, "base", bias)
    factors = factors.to(dtype)
    if factors.bias is not None:
        bias = factors.bias
    if factors.method == "lora":
        return _Work(part, "lora", bias, factors)
    few = part.rows * factors.rank <= _EXPAND_ROWS_PER_SEGMENT
    strategy = modulator.strategy
    if strategy == "expand" or (
        strategy == "auto" and few and not modulator.folded.has(part.slot, layer)
    ):
        return _Work(part, "expand", bias, factors)
    return _Work(part, "fold", bias, factors)


def _run_thin(
    y: torch.Tensor, x: torch.Tensor, w0: torch.Tensor, work: list[_Work], workspace: Workspace
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


def _pieces(item: _Work) -> Iterator[_Piece]:
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


def _folded(item: _Work, base: _Base, modulator: Modulator, layer: str) -> torch.Tensor:
    """W0 ⊙ (1 + BA) of the item's slot: kept, kept from now on, or in a buffer of the moment."""
    assert item.factors is not None
    slot = item.part.slot
    if modulator.strategy in ("auto", "cached"):
        kept = modulator.folded.get(slot, layer)
        if kept is not None and kept.dtype == base.dtype:
            return kept
    w0 = base.weight()
    shape = (w0.shape[0], w0.shape[1])
    room = None
    if modulator.strategy == "cached":
        room = modulator.folded.reserve(slot, layer, shape, base.dtype)
    if room is None:
        room = modulator.workspace.take("folded", shape, base.dtype, w0.device)
    try:
        torch_ops.fold_into(room, w0, item.factors.a, item.factors.b)
    except BaseException:
        # What was reserved holds nothing yet; a later call must not find it.
        modulator.folded.discard(slot, layer)
        raise
    return room


def _reference(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: Mapping[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    truth = reference.modulated_linear(
        x,
        weight.dequantize(dtype=torch.float32),
        {
            slot: (f.method, f.a, f.b, f.scale, f.bias)
            for slot, f in ((slot, slots.get(slot)) for slot in segments.slots)
            if f is not None
        },
        segments,
        bias,
    )
    return truth.to(x.dtype)
