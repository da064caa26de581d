"""Which rows of a batch are computed how: the exact strategies, their choice and their buffers.

    base      y = x W0ᵀ + b                                   rows of slots without factors here
    lora      base + s (x Aᵀ) Bᵀ                              every LoRA segment
    fold      y = x (W0 + W0 ⊙ BA)ᵀ + b                       W0 dequantized once per call
    expand    base + Σ_k b_k ⊙ (W0 (a_k ⊙ x))                 few rows; all of them in one matmul
    cached    fold, with the folded weight kept between calls
    native    all of these in one pass over W0, by the compiled CPU kernel, in bfloat16
    fused     all but lora in one pass over W0, by the GPU kernel: ``adapters.fused``
    reference float64, as the equations are written

``auto`` takes, for every layer and segment, what ``adapters.costs`` predicts to be the cheapest.
The arithmetic is in ``adapters.kernels``; layers and residency bring weights, factors and cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from adapters import native_path
from adapters.costs import UNMEASURED, CostModel, Offers, Rows, Way, choose
from adapters.costs import saving_ns as predicted_saving_ns
from adapters.folded import FoldedCache
from adapters.kernels import native_ops, reference, torch_ops
from adapters.plan import Plan
from adapters.quant import QuantizedWeight
from adapters.segments import Segment, Segments
from adapters.slot_factors import SlotFactors
from adapters.torch_path import Sources, Work, run_into
from adapters.workspace import Workspace

__all__ = [
    "STRATEGIES",
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

_FORCED: Mapping[Strategy, Way] = {"fold": "fold", "expand": "expand", "cached": "kept"}
# Calls of the bare base whose bounds are kept ready, one for each number of rows.
_BASE_CALLS_KEPT = 256


@dataclass(slots=True)
class _Prepared:
    """What was settled for a layer and a segment table; true while ``version`` is the cache's."""

    segments: Segments
    slots: Mapping[int, SlotFactors]
    dtype: torch.dtype
    strategy: Strategy
    version: int
    ways: tuple[Way, ...]
    call: native_path.Call | None  # None: torch operators do it


class Modulator:
    """The state that all layers of one model share: the strategy, the buffers, the current plan.

    One thread runs forwards; nothing here is guarded against two.
    """

    def __init__(self, strategy: Strategy = "auto", costs: CostModel = UNMEASURED) -> None:
        self.strategy: Strategy = strategy
        self.costs = costs
        self.workspace = Workspace()
        self.folded = FoldedCache(0, torch.device("cpu"))
        self.plan: Plan | None = None
        self._tokens = Segments(())  # of the latest plan
        self._bounds: tuple[Segments, bytes] = (Segments(()), b"")  # of the latest native call
        self._prepared: dict[str, _Prepared] = {}  # by layer, of its latest call
        self._alone: dict[int, native_path.Call] = {}  # for so many rows of the base

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[None]:
        """Make ``plan`` current; what was current before comes back."""
        # Steps of one batch are alike: the very same table lets layers keep what they prepared.
        if plan.tokens == self._tokens:
            plan.tokens = self._tokens
        self._tokens = plan.tokens
        self.folded.count_forward(plan.slots)
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def forget(self, slot: int) -> None:
        """Drop what was derived from a slot that no batch uses any more; in any thread."""
        self.folded.forget(slot)  # with this, nothing that was prepared holds any longer:
        self._prepared.clear()  # it would only keep factors alive

    def base_linear(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x W0ᵀ + bias, by the faster of the compiled kernel and torch: ``[..., out]``."""
        count = x.numel() // x.shape[-1]
        if count and weight.kind in ("nf4", "fp4") and self.runs_native(x, weight, bias):
            offers = self.offers(weight, has_native=True)
            size = weight.shape[0] * weight.shape[1]
            if choose(offers, size, (Rows(count, 0),)).backend == "native":
                alone = self._alone.get(count)
                if alone is None:
                    if len(self._alone) >= _BASE_CALLS_KEPT:
                        self._alone.clear()
                    alone = self._alone[count] = native_path.Call.of_base(count)
                y = native_path.run(x.reshape(count, -1), weight, alone, bias, self.workspace)
                return y.view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, self.workspace.dequantized(weight, x.dtype), bias)

    def offers(self, weight: QuantizedWeight, *, has_native: bool) -> Offers:
        """What the backends that may be used take for a layer like ``weight``."""
        offers = self.costs.offers(weight.shape, has_native=has_native)
        if self.strategy == "native":
            return tuple(one for one in offers if one[0] == "native") or offers
        return offers

    def bounds_of(self, segments: Segments) -> bytes:
        """``native_ops.pack_bounds``, made once for the many layers of a forward."""
        if self._bounds[0] is not segments:
            self._bounds = (segments, native_ops.pack_bounds(segments))
        return self._bounds[1]

    def runs_native(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> bool:
        """Whether the compiled kernel may be used, is there, and takes these rows and weights."""
        return self.strategy in ("auto", "native") and native_path.takes(x, weight, bias)

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
        """``modulated_linear`` with this model's strategy, buffers and cache.

        What was settled for the layer's latest call is used again while it holds. That asks that
        ``slots`` only change by ``AdaptedModel.install`` and ``uninstall``, which say so.
        """
        known = self._prepared.get(layer)
        if (
            known is not None
            and known.segments is segments
            and known.slots is slots
            and known.dtype == x.dtype
            and known.strategy == self.strategy
            and known.version == self.folded.version
            and known.call is not None
        ):
            return native_path.run(x, weight, known.call, bias, self.workspace)
        segments.check_covers(x.shape[0])
        if self.strategy == "reference":
            return _reference(x, weight, slots, segments, bias)
        known = self._prepared[layer] = _prepare(
            x, weight, slots, segments, bias, modulator=self, layer=layer
        )
        return _run(x, weight, known, bias, modulator=self, layer=layer)


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
    prepared = _prepare(x, weight, slots, segments, bias, modulator=modulator, layer=layer)
    return _run(x, weight, prepared, bias, modulator=modulator, layer=layer)


def _run(
    x: torch.Tensor,
    weight: QuantizedWeight,
    prepared: _Prepared,
    bias: torch.Tensor | None,
    *,
    modulator: Modulator,
    layer: str,
) -> torch.Tensor:
    if prepared.call is not None:
        return native_path.run(x, weight, prepared.call, bias, modulator.workspace)
    work = [
        _work(part, prepared.slots, way, dtype=x.dtype, bias=bias)
        for part, way in zip(prepared.segments.parts, prepared.ways, strict=True)
    ]
    y = x.new_empty(x.shape[0], weight.shape[0])
    base = _Base(weight, x.dtype, modulator)
    sources = Sources(base.weight, lambda item: _folded(item, base, modulator, layer))
    run_into(y, x, work, sources, modulator.workspace)
    return y


def _prepare(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: Mapping[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None,
    *,
    modulator: Modulator,
    layer: str,
) -> _Prepared:
    """Choose for every segment; folds what is worth keeping from now on."""
    found = [slots.get(part.slot) for part in segments.parts]
    native = bool(segments.parts) and modulator.runs_native(x, weight, bias)
    native = native and all(factors is None or factors.native_record for factors in found)
    size = weight.shape[0] * weight.shape[1]
    offers = modulator.offers(weight, has_native=native)
    uses_kept = modulator.strategy in ("auto", "cached")
    if modulator.strategy == "auto" and modulator.folded.budget_bytes:
        _keep_what_pays(x, weight, segments, found, offers, modulator=modulator, layer=layer)
    folded = modulator.folded
    work = tuple(
        Rows(part.rows, 0)
        if factors is None or factors.method == "lora"
        else Rows(part.rows, factors.rank, uses_kept and folded.has(part.slot, layer, x.dtype))
        for part, factors in zip(segments.parts, found, strict=True)
    )
    version = folded.version
    choice = choose(offers, size, work, _FORCED.get(modulator.strategy))
    call = None
    if choice.backend == "native":
        kept = [
            folded.get(part.slot, layer) if way == "kept" else None
            for part, way in zip(segments.parts, choice.ways, strict=True)
        ]
        call = native_path.Call.of(
            segments, found, choice.ways, kept, modulator.bounds_of(segments)
        )
    return _Prepared(segments, slots, x.dtype, modulator.strategy, version, choice.ways, call)


def _keep_what_pays(
    x: torch.Tensor,
    weight: QuantizedWeight,
    segments: Segments,
    found: list[SlotFactors | None],
    offers: Offers,
    *,
    modulator: Modulator,
    layer: str,
) -> None:
    folded = modulator.folded
    size = weight.shape[0] * weight.shape[1]
    base = _Base(weight, x.dtype, modulator)
    for part, factors in zip(segments.parts, found, strict=True):
        if factors is None or factors.method == "lora":
            continue
        if folded.has(part.slot, layer, x.dtype):
            continue
        saving = predicted_saving_ns(offers, size, part.rows, factors.rank)
        fill = min(costs.fill_ns(size, factors.rank) for _, costs in offers)
        if folded.is_worth(part.slot, size * x.dtype.itemsize, saving, fill):
            _fold_to_keep((part.slot, layer), factors.to(x.dtype), base, folded, saving)


@dataclass(slots=True)
class _Base:
    """W0 of one call, dequantized when first needed: a call may do with folded weights alone."""

    stored: QuantizedWeight
    dtype: torch.dtype
    modulator: Modulator
    dense: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        if self.dense is None:
            self.dense = self.modulator.workspace.dequantized(self.stored, self.dtype)
        return self.dense


def _work(
    part: Segment,
    slots: Mapping[int, SlotFactors],
    way: Way,
    *,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> Work:
    factors = slots.get(part.slot)
    if factors is None:
        return Work(part, "base", bias)
    factors = factors.to(dtype)
    if factors.bias is not None:
        bias = factors.bias
    if factors.method == "lora":
        return Work(part, "lora", bias, factors)
    return Work(part, "expand" if way == "expand" else "fold", bias, factors)


def _folded(item: Work, base: _Base, modulator: Modulator, layer: str) -> torch.Tensor:
    """W0 ⊙ (1 + BA) of the item's slot: kept, kept from now on, or in a buffer of the moment."""
    assert item.factors is not None
    slot = item.part.slot
    if modulator.strategy in ("auto", "cached"):
        kept = modulator.folded.get(slot, layer)
        if kept is not None and kept.dtype == base.dtype:
            return kept
    if modulator.strategy == "cached":
        kept = _fold_to_keep((slot, layer), item.factors, base, modulator.folded)
        if kept is not None:
            return kept
    w0 = base.weight()
    room = modulator.workspace.take("folded", (w0.shape[0], w0.shape[1]), base.dtype, w0.device)
    torch_ops.fold_into(room, w0, item.factors.a, item.factors.b)
    return room


def _fold_to_keep(
    key: tuple[int, str],
    factors: SlotFactors,
    base: _Base,
    folded: FoldedCache,
    saving_ns: float = 0.0,
) -> torch.Tensor | None:
    w0 = base.weight()
    shape = (w0.shape[0], w0.shape[1])
    room = folded.reserve(*key, shape, base.dtype, saving_ns)
    if room is None:
        return None
    try:
        torch_ops.fold_into(room, w0, factors.a, factors.b)
    except BaseException:
        # What was reserved holds nothing yet; a later call must not find it.
        folded.discard(*key)
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
