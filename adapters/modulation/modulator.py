"""Which rows of a batch are computed how: the exact strategies, their choice and their buffers.

    base      y = x W0ᵀ + b                                   rows of slots without factors here
    lora      base + s (x Aᵀ) Bᵀ                              every LoRA segment
    fold      y = x (W0 + W0 ⊙ BA)ᵀ + b                       W0 dequantized once per call
    expand    base + Σ_k b_k ⊙ (W0 (a_k ⊙ x))                 few rows; all of them in one matmul
    cached    fold, with the folded weight kept between calls
    native    all of these in one pass over W0, by the compiled CPU kernel
    fused     all but lora in one pass over W0, by the GPU kernel: ``adapters.modulation.fused``
    reference float64, as the equations are written

``auto`` takes, for every layer and segment, what was the fastest when
``adapters.modulation.autotune`` timed
it, and before that what ``strategy.default_way`` says. A layer makes a ``LayerCall``; the modulator
settles who computes it and how each of its segments, and ``fused``, ``native_path`` or
``torch_path`` does. Layers and residency bring weights, factors and the cache of folded weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from adapters.kernels import native_ops, reference
from adapters.modulation import fixed_blocks, native_path, torch_path
from adapters.modulation.autotune import Autotuner
from adapters.modulation.fixed_blocks import FixedBlocks
from adapters.modulation.folded import FoldedCache
from adapters.modulation.fused import FusedLayers
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.plan import Plan
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.static_layers import StaticLayers
from adapters.modulation.strategy import (
    AlikeSegments,
    Backend,
    Candidate,
    Computation,
    SegmentShape,
    Strategy,
    default_way,
    groups_of,
    ways_of,
)
from adapters.modulation.workspace import Workspace
from adapters.segments import BASE_SLOT, Segments, from_runs

_FORCED: Mapping[Strategy, Computation] = {"fold": "fold", "expand": "expand", "cached": "kept"}
# Tables of the bare base that are kept ready, one for each number of rows.
_BASE_TABLES_KEPT = 256
# Calls for which what was settled holds at most: what is timed meanwhile is to be heeded.
_SETTLED_CALLS = 64
_FEWEST_WEIGHTS = 1 << 14  # of a layer worth timing: below, every strategy takes microseconds
# A folded weight that is kept is written to fresh memory, one of the moment to a warm buffer.
_KEEPING_OVER_FOLDING = 2.0


@dataclass(slots=True)
class _Settled:
    """How the latest call of a layer was computed; true while ``version`` is the cache's."""

    segments: Segments
    slots: Mapping[int, SlotFactors]
    dtype: torch.dtype
    strategy: Strategy
    version: int
    ways: Sequence[Computation]
    records: native_path.Records | None  # None: torch operators compute it
    calls_left: int

    def holds(self, call: LayerCall, strategy: Strategy, version: int) -> bool:
        return (
            self.calls_left > 0
            and self.segments is call.segments
            and self.slots is call.slots
            and self.dtype == call.x.dtype
            and self.strategy == strategy
            and self.version == version
        )


class Modulator:
    """The state that all layers of one model share: the strategy, the buffers, the current plan.

    One thread runs forwards; nothing here is guarded against two.

    Args:
        strategy: How HiRA rows are computed.
        tuner: What times the strategies; None leaves all to the rule.
    """

    def __init__(self, strategy: Strategy = "auto", tuner: Autotuner | None = None) -> None:
        self.strategy: Strategy = strategy
        self.tuner = tuner
        self.workspace = Workspace()
        self.folded = FoldedCache(0, torch.device("cpu"))
        self.fused: FusedLayers | None = None  # None: no layer uses the fused kernel
        self.fixed: FixedBlocks | None = None  # None: rows may differ in their last bits by batch
        self.static: StaticLayers | None = None  # None: no steps over fixed buffers
        self.plan: Plan | None = None
        self._tokens = Segments(())  # of the latest plan
        self._bounds: tuple[Segments, bytes] = (Segments(()), b"")  # of the latest native call
        self._settled: dict[str, _Settled] = {}  # by layer, of its latest call
        self._base_tables: dict[int, Segments] = {}  # for so many rows of the base

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[None]:
        """Make ``plan`` current; what was current before comes back."""
        # Steps of one batch are alike: the very same table lets layers keep what they settled.
        if plan.tokens == self._tokens:
            plan.tokens = self._tokens
        self._tokens = plan.tokens
        self.folded.count_forward(plan.slots)
        if self.tuner is not None:
            self.tuner.begin_forward()
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def kernel(self, dtype: torch.dtype, device: torch.device) -> str:
        """What computes linear layers in ``dtype``: ``triton``, ``torch``, or the instruction set
        that the compiled kernel runs on."""
        if self.fused is not None:
            return "triton"
        compiled = None
        if device.type == "cpu" and self.strategy in {"auto", "native"}:
            compiled = native_ops.instruction_set(dtype)
        return compiled or "torch"

    def forget(self, slot: int) -> None:
        """Drop what was derived from a slot that no batch uses any more; in any thread."""
        self.folded.forget(slot)  # with this, nothing that was settled holds any longer:
        self._settled.clear()  # it would only keep factors alive

    def base_segments(self, rows: int) -> Segments:
        """The table of so many rows of the bare base; the same one each time."""
        table = self._base_tables.get(rows)
        if table is None:
            if len(self._base_tables) >= _BASE_TABLES_KEPT:
                self._base_tables.clear()
            table = self._base_tables[rows] = from_runs([(BASE_SLOT, rows)] if rows else [])
        return table

    def linear(self, call: LayerCall) -> torch.Tensor:
        """Compute a call: a new ``[rows, out]`` in the dtype of ``x``, not overlapping any buffer.

        Raises:
            SegmentMismatch: The segments do not cover the rows; checked before any write.
        """
        call.segments.check_covers(call.x.shape[0])
        if self.fused is not None and self.fused.takes(call):
            try:
                y, left = self.fused.linear(call, self.tuner)
            except Exception as error:
                if not self.fused.gives_up(call.path, error):
                    raise
                return self._without_kernel(call)
            for place in left:
                part = call.segments.parts[place]
                y[part.start : part.stop] = self._without_kernel(call.of_segments([place]))
            return y
        return self._without_kernel(call)

    def _without_kernel(self, call: LayerCall) -> torch.Tensor:
        if self.fixed is not None:
            return fixed_blocks.run(call, self.fixed, self.workspace, self.folded)
        if self.strategy == "reference":
            return _reference(call)
        return self._by_operators(call)

    def _by_operators(self, call: LayerCall) -> torch.Tensor:
        settled = self._settled.get(call.path)
        if settled is None or not settled.holds(call, self.strategy, self.folded.version):
            settled = self._settled[call.path] = self._settle(call)
        settled.calls_left -= 1
        if settled.records is not None:
            return native_path.run_native(call, settled.records, self.workspace)
        return torch_path.run_torch(call, settled.ways, self.workspace, self.folded)

    def _settle(self, call: LayerCall) -> _Settled:
        """Choose for every segment; times what is due, and folds what pays from now on."""
        native = self.strategy in {"auto", "native"} and native_path.takes(call)
        backends: list[Backend] = ["native", "torch"] if native else ["torch"]
        if native and self.strategy == "native":
            backends = ["native"]
        groups = self._groups(call)
        heed = (
            self.tuner if call.weight.shape[0] * call.weight.shape[1] >= _FEWEST_WEIGHTS else None
        )
        calls_left = _SETTLED_CALLS
        if heed is not None and self.strategy in {"auto", "native"}:
            keeps = self.strategy == "auto" and self.folded.budget_bytes > 0
            possible = [(group, _candidates(group, backends, keeps)) for group in groups]
            for group, candidates in possible:
                if len(candidates) > 1:
                    self._time(call, group, candidates, heed)
                    if not heed.is_settled(group.bucket):
                        calls_left = 1
            # Only now: what is kept for one group may take the place of what another one has.
            for group, candidates in possible:
                if keeps and group.largest.rank and not group.largest.is_kept:
                    self._keep_what_pays(call, group, candidates, heed)
            groups = self._groups(call)
        version = self.folded.version
        backend, ways = choose_ways(
            groups, len(call.segments.parts), backends, heed, _FORCED.get(self.strategy)
        )
        records = None
        if backend == "native":
            bounds = self._bounds_of(call.segments)
            records = native_path.pack_records(call, ways, bounds, self.workspace, self.folded)
        return _Settled(
            call.segments, call.slots, call.x.dtype, self.strategy, version, ways, records,
            calls_left,
        )  # fmt: skip

    def _groups(self, call: LayerCall) -> tuple[AlikeSegments, ...]:
        dtype, uses_kept = call.x.dtype, self.strategy in {"auto", "cached"}
        parts = tuple(
            SegmentShape(part.rows, 0)
            if own is None or own.method == "lora"
            else SegmentShape(
                part.rows,
                own.rank,
                uses_kept and self.folded.has(part.slot, call.path, dtype),
            )
            for part, own in zip(call.segments.parts, call.factors, strict=True)
        )
        storage = f"{call.weight.kind} {str(dtype).removeprefix('torch.')}"
        return groups_of(call.weight.shape, storage, parts)

    def _time(
        self,
        call: LayerCall,
        group: AlikeSegments,
        candidates: Sequence[Candidate],
        tuner: Autotuner,
    ) -> None:
        if tuner.is_due(group.bucket, candidates):
            alone, count = call.of_segments(group.places), len(group.places)
            runs = {one: self._run_of(alone, one[0], (one[1],) * count) for one in candidates}
            tuner.run(group.bucket, runs)

    def _run_of(
        self, call: LayerCall, backend: Backend, ways: Sequence[Computation]
    ) -> Callable[[], torch.Tensor]:
        if backend == "torch":
            return partial(torch_path.run_torch, call, ways, self.workspace, self.folded)
        bounds = native_ops.pack_bounds(call.segments)
        records = native_path.pack_records(call, ways, bounds, self.workspace, self.folded)
        return partial(native_path.run_native, call, records, self.workspace)

    def _keep_what_pays(
        self,
        call: LayerCall,
        group: AlikeSegments,
        candidates: Sequence[Candidate],
        tuner: Autotuner,
    ) -> None:
        """Fold what saves more time than it takes; by what was timed, so not before."""
        times = {one: tuner.ns(group.bucket, one) for one in candidates}
        known = {one: ns for one, ns in times.items() if ns is not None}
        if len(known) < len(times):
            return
        # What weights that are kept took goes before: it is of the memory that they lie in.
        kept = [tuner.ns(group.bucket, (backend, "kept")) for backend, _ in candidates]
        with_kept = [ns for ns in kept if ns is not None]
        with_kept = with_kept or [ns for (_, way), ns in known.items() if way == "held"]
        without = min(ns for (_, way), ns in known.items() if way != "held")
        count = len(group.places)
        saving = (without - min(with_kept)) / count
        folding = max(0.0, known["torch", "fold"] - known["torch", "held"]) / count
        weights = torch_path.Weights(call, self.workspace, self.folded)
        nbytes = call.weight.shape[0] * call.weight.shape[1] * call.x.dtype.itemsize
        for place in group.places:
            slot = call.segments.parts[place].slot
            if self.folded.has(slot, call.path, call.x.dtype):  # by an earlier segment
                continue
            if self.folded.is_worth(slot, nbytes, saving, _KEEPING_OVER_FOLDING * folding):
                weights.keep(slot, call.slots[slot].to(call.x.dtype), saving)

    def _bounds_of(self, segments: Segments) -> bytes:
        """``native_ops.pack_bounds``, made once for the many layers of a forward."""
        if self._bounds[0] is not segments:
            self._bounds = (segments, native_ops.pack_bounds(segments))
        return self._bounds[1]


def choose_ways(
    groups: Sequence[AlikeSegments],
    count: int,
    backends: Sequence[Backend],
    tuner: Autotuner | None,
    forced: Computation | None = None,
) -> tuple[Backend, list[Computation]]:
    """Who computes a call, and how each of its ``count`` segments; pure, given what was timed.

    The fastest way of every group, by the backend whose sum is the least; where a bucket was not
    timed, ``default_way`` by the first backend.

    Args:
        groups: Together all segments.
        count: Of segments.
        backends: Those that may be used, the one to prefer first.
        tuner: What was timed; None: nothing.
        forced: The way of every modulated segment. ``kept`` keeps what is not there.
    """
    choices: list[tuple[float, Backend, list[Computation]]] = []
    for backend in backends:
        total, is_known = 0.0, True
        ways: list[Computation] = ["base"] * count
        for group in groups:
            part = group.largest
            times = {} if tuner is None else _times(tuner, group, backend)
            if forced is not None and part.rank:
                way = forced
            elif len(times) < len(ways_of(part)):
                way, is_known = default_way(part), False
            else:
                way = min(times, key=times.__getitem__)
                total += times[way]
            for place in group.places:
                ways[place] = way
        if not is_known:
            total = -math.inf if backend == backends[0] else math.inf
        choices.append((total, backend, ways))
    _, backend, ways = min(choices, key=lambda one: one[0])
    return backend, ways


def _times(tuner: Autotuner, group: AlikeSegments, backend: Backend) -> dict[Computation, float]:
    found = {way: tuner.ns(group.bucket, (backend, way)) for way in ways_of(group.largest)}
    return {way: ns for way, ns in found.items() if ns is not None}


def _candidates(group: AlikeSegments, backends: Sequence[Backend], keeps: bool) -> list[Candidate]:
    """What is timed for a group: all that is possible, and what a kept weight would take."""
    ways = ways_of(group.largest)
    if keeps and group.largest.rank and not group.largest.is_kept:
        ways = (*ways, "held")
    return [(backend, way) for backend in backends for way in ways]


def _reference(call: LayerCall) -> torch.Tensor:
    truth = reference.modulated_linear(
        call.x,
        call.weight.dequantize(dtype=torch.float32),
        {
            part.slot: (own.method, own.a, own.b, own.scale, own.bias)
            for part, own in zip(call.segments.parts, call.factors, strict=True)
            if own is not None
        },
        call.segments,
        call.bias,
    )
    return truth.to(call.x.dtype)
