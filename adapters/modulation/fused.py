"""A model's linear layers on the fused kernel: what it reads of them, and when it may be used.

The kernel (``adapters.kernels.triton_ops``) takes HiRA rows and rows of the bare base, straight
from 4-bit storage. Around it, here, are LoRA's two thin products and the biases that adapters
bring. What it does not take (a weight that is not 4-bit, a rank above 128, rows of another type) is
left to the modulator, which computes it by the torch operators, segment by segment.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from adapters.errors import ShapeMismatch, UnsupportedOption
from adapters.kernels import reference, torch_ops
from adapters.kernels.triton_operands import (
    ADDRESS_MULTIPLE_BYTES,
    KERNEL_DTYPES,
    KERNEL_MAX_RANK,
    FactorTable,
    PackedWeight,
    pack_weight,
)
from adapters.kernels.triton_tiles import BatchTiles, FewRows, TokenTiles, padded_rank
from adapters.modulation.autotune import Autotuner
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.static_rows import StaticRows
from adapters.modulation.step_forms import (
    MOST_EXPANDED,
    TIMED_ADAPTERS,
    TIMED_ROWS,
    StepCase,
    StepForm,
    StepForms,
    fastest,
)
from adapters.modulation.strategy import Candidate, Computation, bucket_of
from adapters.modulation.workspace import Workspace
from adapters.segments import BASE_SLOT, Segments, from_runs

_FIRST_SLOTS = 17
# Segment tables of one forward: tokens, sequences, logits, one to spare, and each of the bare base.
_TILES_KEPT = 8
_LEAST_CAPABILITY = (8, 0)  # the kernels are compiled, in tests, for 8.0 to 9.0
# Of the probe, relative to its largest answer: bfloat16 rounds by 2⁻⁸.
_PROBE_TOLERANCE = 2e-2

# Rows of a slot below which a weight of its own is hopeless.
_LEAST_ROWS_OF_A_SLOT = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that the kernel serves: its index in the factor table, and its weight."""

    index: int
    weight: PackedWeight


class FusedLayers:
    """The layers of one model that the fused kernel serves, and the factors in their slots.

    One thread runs forwards. ``place`` and ``clear`` may run in another, for slots that no running
    batch uses.

    Args:
        weights: By layer path. The bytes of those that the kernel serves are put into its order,
            once, in place.
        dtype: The compute dtype.
        device: Where the weights are.

    Raises:
        UnsupportedOption: The kernel cannot run here; see ``obstacle``.
    """

    def __init__(
        self, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype, device: torch.device
    ) -> None:
        reason = obstacle(dtype, device)
        if reason is not None:
            raise UnsupportedOption(
                "The fused kernel cannot run here.",
                found=reason,
                expected="a CUDA device of capability 8.0, triton, and bfloat16 or float16",
                fix="Set modulation to auto: it uses the kernel where it can run.",
            )
        self._ops = _ops()
        self._layers = _packed(weights)
        # With its index: "cuda" alone would differ from the device of any tensor.
        self.device = torch.empty(0, device=device).device
        shapes = [layer.weight.shape for layer in self._layers.values()]
        self._table = FactorTable(_FIRST_SLOTS, shapes, dtype, self.device)
        self._tiles: list[BatchTiles] = []  # latest last
        self._workspace = Workspace()
        self._first_row = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._step_forms = StepForms()
        self._step_buffers = Workspace()

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    def __len__(self) -> int:
        return len(self._layers)

    def takes(self, call: LayerCall) -> bool:
        """Whether the kernel serves this layer for these rows."""
        x = call.x
        return (
            call.path in self._layers
            and x.dtype == self._table.dtype
            and x.device == self.device
            and x.numel() > 0
        )

    def place(self, slot: int, factors: Mapping[str, SlotFactors]) -> dict[str, SlotFactors]:
        """Put an adapter into a slot that no batch uses; what was there is gone.

        Returns:
            The factors to keep in the layers: the same, with B laid out as the kernel reads it.
        """
        kept = dict(factors)
        entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for path, entry in factors.items():
            layer = self._layers.get(path)
            if layer is None or not self._fits(entry):
                continue
            b = entry.b if entry.b.t().is_contiguous() else entry.b.t().contiguous().t()
            if _misaligned(entry.a) or _misaligned(b):
                continue
            kept[path] = entry if b is entry.b else replace(entry, b=b)
            entries[layer.index] = (entry.a, b)
        self._table.grow(slot + 1)
        self._table.place(slot, entries)
        return kept

    def clear(self, slot: int) -> None:
        """Empty a slot that no batch uses."""
        self._table.clear(slot)

    def holds(self, path: str) -> bool:
        """Whether the kernel can serve this layer at all."""
        return path in self._layers

    def choose_for_steps(self, most_rows: int, ranks: Sequence[int]) -> None:
        """Time every form on each shape of weight: steps over fixed buffers cannot.

        From now on ``rows_by_address`` takes the fastest. A form that is wrong, or cannot run, is
        not tried; where memory does not hold the buffers of ``product``, it is not used.

        Args:
            most_rows: Of a step.
            ranks: Padded, that steps are made for; 0: no HiRA.
        """
        proved = proved_forms(self.dtype, self.device)
        weights = {layer.weight.shape: layer.weight for layer in self._layers.values()}
        chosen: dict[StepCase, StepForm] = {}
        for rows in (one for one in reversed(TIMED_ROWS) if one <= max(1, most_rows)):
            for shape, weight in weights.items():
                for rank in ranks:
                    runs = self._step_runs(weight, rows, rank, proved)
                    if len(runs) > 1:
                        chosen[shape, rank, rows] = fastest(runs, self.device)
        self._step_forms = StepForms(chosen)
        # What was taken for forms that lost is given back; the rest must never move.
        self._step_buffers = Workspace()
        try:
            self._reserve_for_steps()
        except torch.OutOfMemoryError:
            logger.warning(
                "No memory for the buffers of steps by products: the fused kernel computes them. "
                "Lower kv_bytes or device_bytes to make room."
            )
            self._step_forms = self._step_forms.without("product")
            self._step_buffers = Workspace()

    @property
    def step_bytes(self) -> int:
        """Bytes of the buffers that steps over fixed buffers share."""
        return self._step_buffers.nbytes

    def step_form(self, path: str, rank: int, rows: int) -> StepForm:
        """What computes a layer in such steps, of so many rows."""
        return self._step_forms.of(self._layers[path].weight.shape, rank, rows)

    def _take_for_steps(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        return self._step_buffers.take(name, shape, dtype, self.device)

    def _reserve_for_steps(self) -> None:
        """Take the largest buffers that chosen products need, before any step is captured."""
        for shape, rank, rows in self._step_forms.cases("product"):
            _scratch_ops().product_buffers(shape, rows, rank, self.dtype, self._take_for_steps)

    def _step_runs(
        self, weight: PackedWeight, rows: int, rank: int, proved: frozenset[Computation]
    ) -> dict[StepForm, Callable[[], torch.Tensor]]:
        """Each form as a call on random rows, as many adapters in them as there usually are."""
        out_features, in_features = weight.shape
        adapters = min(rows, TIMED_ADAPTERS) if rank else 0
        table = FactorTable(adapters + 1, [weight.shape], self.dtype, self.device)
        for slot in range(1, adapters + 1):
            a, b_t = (
                torch.randn(rank, one, device=self.device, dtype=self.dtype)
                for one in (in_features, out_features)
            )
            table.place(slot, {0: (a, b_t.t())})
        made = StaticRows(rows, self.device)
        made.fill([1 + row % adapters if adapters else BASE_SLOT for row in range(rows)])
        made.shape(rows, rank, False)
        x = torch.randn(rows, in_features, device=self.device, dtype=self.dtype)

        def run(form: StepForm) -> Callable[[], torch.Tensor]:
            return lambda: self._by_form(
                form, x, weight, table.addresses, layer=0, tiles=made.tiles, slots=made.slots,
                rank=rank, bias=None,
            )  # fmt: skip

        runs: dict[StepForm, Callable[[], torch.Tensor]] = {"tiles": run("tiles")}
        if rows == 1 and rank and "row" in proved:
            runs["row"] = run("row")
        if rows * (rank + 1) <= MOST_EXPANDED and "product" in proved:
            runs["product"] = run("product")
        return runs

    def _by_form(
        self,
        form: StepForm,
        x: torch.Tensor,
        weight: PackedWeight,
        table: torch.Tensor,
        *,
        layer: int,
        tiles: FewRows,
        slots: torch.Tensor,
        rank: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        y: torch.Tensor
        if form == "row":
            y = _one_row_ops().one_row_linear(
                x, weight, table, layer, slots,
                rank=tiles.rank, first_row=self._first_row, bias=bias,
            )  # fmt: skip
        elif form == "product":
            y = _scratch_ops().product_linear(
                x, weight, table, layer, slots, rank=rank, take=self._take_for_steps, bias=bias
            )
        else:
            y = self._ops.few_rows_linear(x, weight, table, layer, tiles, bias)
        return y

    def serves(self, path: str, x: torch.Tensor) -> bool:
        """Whether the kernel serves this layer for rows of this type and device."""
        return path in self._layers and x.dtype == self._table.dtype and x.device == self.device

    def rows_by_address(
        self,
        path: str,
        x: torch.Tensor,
        table: torch.Tensor,
        *,
        layer: int,
        tiles: FewRows | TokenTiles,
        slots: torch.Tensor,
        rank: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """A layer that ``serves`` holds for, with nothing checked and nothing read on the host.

        Args:
            path: Of the layer.
            x: ``[rows, in]``.
            table: int64 ``[slots, layers, 3]``, as ``FactorTable.addresses``.
            layer: Of the table.
            tiles: That hold all rows of ``x``; its buffers may change until the launch runs.
            slots: int32 ``[rows]``, a buffer likewise.
            rank: Padded, that the launches are made for; 0: no HiRA.
            bias: ``[out]``, or None.

        Returns:
            A new ``[rows, out]`` in the dtype of ``x``.
        """
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = self._layers[path].weight
        if isinstance(tiles, TokenTiles):
            y: torch.Tensor = self._ops.token_rows_linear(x, weight, table, layer, tiles, bias)
            return y
        form = self._step_forms.of(weight.shape, rank, x.shape[0])
        return self._by_form(
            form, x, weight, table, layer=layer, tiles=tiles, slots=slots, rank=rank, bias=bias
        )

    def add_lora_by_address(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        *,
        scales: torch.Tensor,
        layer: int,
    ) -> None:
        """Add each row's s (x Aᵀ) Bᵀ to ``y``, its factors found by address.

        Args:
            y, x: ``[rows, out]``, ``[rows, in]``.
            slots: int32 ``[rows]``.
            table, scales: ``[slots, layers, 3]`` of LoRA factors, float32 ``[slots, layers]``.
            layer: Of the tables.
        """
        self._ops.add_lora_rows(y, x, slots, table, scales, layer)

    def linear(
        self, call: LayerCall, tuner: Autotuner | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Compute a call that ``takes`` holds for, but for the segments that the kernel does not.

        Args:
            call: Its factors are as ``place`` gave them.
            tuner: What has timed the forms of the equation; until it has, and without it, the fused
                kernel computes all.

        Returns:
            A new ``[rows, out]`` in the dtype of ``x``, and the numbers of the segments whose rows
            are still to be computed.

        Raises:
            SegmentMismatch: The segments do not cover the rows.
            SlotNotResident: A segment's slot holds nothing.
        """
        x, bias = call.x, call.bias
        layer = self._layers[call.path]
        found = call.factors
        # A bias of an adapter's own takes the place of the layer's: then each segment adds its own.
        own = any(factors is not None and factors.bias is not None for factors in found)
        y = self._run(layer, call, None if own else bias, tuner)
        left: list[int] = []
        for place, (part, entry) in enumerate(zip(call.segments.parts, found, strict=True)):
            rows = slice(part.start, part.stop)
            if entry is None:
                if own and bias is not None:
                    y[rows].add_(bias)
                continue
            factors = entry.to(x.dtype)
            if factors.method == "hira" and not self._table.rank(part.slot, layer.index):
                left.append(place)
                continue
            if own:
                added = bias if factors.bias is None else factors.bias
                if added is not None:
                    y[rows].add_(added)
            if factors.method == "lora":
                torch_ops.add_lora(y[rows], x[rows], factors.a, factors.b, factors.scale)
        return y, left

    def _run(
        self, layer: _Layer, call: LayerCall, bias: torch.Tensor | None, tuner: Autotuner | None
    ) -> torch.Tensor:
        runs = self.forms(call if bias is call.bias else replace(call, bias=bias))
        if tuner is None:
            return runs["triton", "tiles"]()
        proved = proved_forms(self.dtype, self.device)
        runs = {one: run for one, run in runs.items() if one[1] == "tiles" or one[1] in proved}
        if len(runs) == 1:
            return runs["triton", "tiles"]()
        ranks = [self._table.rank(part.slot, layer.index) for part in call.segments.parts]
        bucket = bucket_of(
            call.weight.shape,
            f"{call.weight.kind} {str(call.x.dtype).removeprefix('torch.')} call",
            rows=call.x.shape[0],
            adapters=max(1, sum(rank > 0 for rank in ranks)),
            rank=max(ranks, default=0),
        )
        if tuner.is_due(bucket, runs):
            tuner.run(bucket, runs)
        if not tuner.is_settled(bucket):
            return runs["triton", "tiles"]()
        known = {one: ns for one in runs if (ns := tuner.ns(bucket, one)) is not None}
        fastest = min(known, key=known.__getitem__, default=None)
        return runs[fastest or ("triton", "tiles")]()

    def forms(self, call: LayerCall) -> dict[Candidate, Callable[[], torch.Tensor]]:
        """Every form of a call that ``takes`` holds for and that is not hopeless."""
        layer, bias = self._layers[call.path], call.bias
        x = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
        parts = call.segments.parts
        ranks = [padded_rank(self._table.rank(part.slot, layer.index)) for part in parts]
        rank = max(ranks, default=0)
        where = (layer.weight, self._table.addresses, layer.index)

        def by_tiles() -> torch.Tensor:
            y: torch.Tensor = self._ops.hira_linear(
                x, layer.weight, self._table, layer.index, self._tiles_of(call.segments), bias=bias
            )
            return y

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return self._workspace.take(name, shape, dtype, x.device)

        @cache
        def row_slots() -> torch.Tensor:
            # Once: a captured launch must not copy from the host.
            return torch.tensor(call.segments.row_slots(), dtype=torch.int32).to(x.device)

        def by_product() -> torch.Tensor:
            y: torch.Tensor = _scratch_ops().product_linear(
                x, *where, row_slots(), rank=rank, take=take, bias=bias
            )
            return y

        def by_scratch() -> torch.Tensor:
            pieces = [
                (part.slot, own, part.start, part.stop)
                for part, own in zip(parts, ranks, strict=True)
            ]
            y: torch.Tensor = _scratch_ops().scratch_linear(
                x, *where, pieces, take=take, bias=None if bias is None else bias.to(x.dtype)
            )
            return y

        def by_row() -> torch.Tensor:
            y: torch.Tensor = _one_row_ops().one_row_linear(
                x, *where, row_slots(), rank=rank, first_row=self._first_row, bias=bias
            )
            return y

        runs: dict[Candidate, Callable[[], torch.Tensor]] = {("triton", "tiles"): by_tiles}
        if x.shape[0] == 1 and rank:
            runs["triton", "row"] = by_row
        if x.shape[0] * (rank + 1) <= MOST_EXPANDED:
            runs["triton", "product"] = by_product
        if x.shape[0] >= _LEAST_ROWS_OF_A_SLOT * len(parts):
            runs["triton", "scratch"] = by_scratch
        return runs

    def _tiles_of(self, segments: Segments) -> BatchTiles:
        """The tiles of a segment table, made once for the many layers of a forward."""
        for tiles in reversed(self._tiles):
            if tiles.segments is segments:
                return tiles
        tiles = BatchTiles(segments, self.device)
        self._tiles = [*self._tiles[1 - _TILES_KEPT :], tiles]
        return tiles

    def _fits(self, entry: SlotFactors) -> bool:
        """Whether the kernel can read these factors."""
        return (
            entry.method == "hira"
            and 1 <= entry.rank <= KERNEL_MAX_RANK
            and entry.a.dtype == entry.b.dtype == self._table.dtype
            and entry.a.device == entry.b.device == self.device
            and entry.a.is_contiguous()
        )


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused kernel cannot run on a device in a compute dtype; None when it can.

    The first call for a device runs the kernel once on a small layer (and compiles it) and compares
    its answer with float64: where it would be wrong, it is not used.
    """
    if dtype not in KERNEL_DTYPES:
        return f"compute dtype {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    ops = _ops()
    if device.type != "cuda":
        return None if ops.INTERPRETED else f"device {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < _LEAST_CAPABILITY:
        return f"a device of capability {capability[0]}.{capability[1]}"
    return _probed(dtype, device)


@lru_cache(maxsize=8)
def _probed(dtype: torch.dtype, device: torch.device) -> str | None:
    try:
        error = _probe_error(dtype, device)
    except Exception as cause:  # a compiler, a driver: whatever fails, torch serves
        logger.warning("The fused kernel failed its probe, torch computes: %s", _in_a_line(cause))
        logger.debug("Where it failed", exc_info=True)
        return f"{type(cause).__name__} in its probe"
    return None if error <= _PROBE_TOLERANCE else f"a relative error of {error:.2g} in its probe"


@lru_cache(maxsize=8)
def proved_forms(dtype: torch.dtype, device: torch.device) -> frozenset[Computation]:
    """The forms beside the fused kernel that were right on a small batch on this device.

    Each is run once, and compiled; what fails, or is wrong, is said in the log and never timed.
    """
    proved: set[Computation] = set()
    forms: tuple[Computation, ...] = ("product", "scratch", "row")
    for form in forms:
        try:
            error = _probe_error(dtype, device, form)
        except Exception as cause:  # a compiler, a driver, a library: the fused kernel serves
            logger.warning("The form %s failed its probe: %s", form, _in_a_line(cause))
            logger.debug("Where it failed", exc_info=True)
            continue
        if error <= _PROBE_TOLERANCE:
            proved.add(form)
        else:
            logger.warning("The form %s is off by %.2g in its probe: not used", form, error)
    return frozenset(proved)


def _probe_error(dtype: torch.dtype, device: torch.device, form: Computation = "tiles") -> float:
    """The largest relative error of a small mixed batch, few rows and many, against float64."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        weight = QuantizedWeight.from_dense(random(64, 256) * 0.2, "nf4", double_quant=False)
        w0 = weight.dequantize(dtype=torch.float32)
        layer = _packed({"": weight})[""]
        table = FactorTable(3, [weight.shape], dtype, device)
        factors = {slot: (random(16, 256), random(16, 64).t()) for slot in (1, 2)}
        for slot, (a, b) in factors.items():
            table.place(slot, {0: (a, b)})
        segments = from_runs([(1, 40), (2, 3), (BASE_SLOT, 2)])
        if form == "row":
            segments = from_runs([(2, 1)])
        x, bias = random(segments.rows, 256), random(64)
        where = (layer.weight, table.addresses, 0)

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        if form == "product":
            slots = torch.tensor(segments.row_slots(), dtype=torch.int32).to(device)
            found = _scratch_ops().product_linear(x, *where, slots, rank=16, take=take, bias=bias)
        elif form == "scratch":
            pieces = [
                (part.slot, 0 if part.slot == BASE_SLOT else 16, part.start, part.stop)
                for part in segments.parts
            ]
            found = _scratch_ops().scratch_linear(x, *where, pieces, take=take, bias=bias)
        elif form == "row":
            zero, two = (torch.tensor([one], dtype=torch.int32).to(device) for one in (0, 2))
            found = _one_row_ops().one_row_linear(
                x, *where, two, rank=16, first_row=zero, bias=bias
            )
        else:
            tiles = BatchTiles(segments, device)
            found = _ops().hira_linear(x, layer.weight, table, 0, tiles, bias=bias)
        truth = reference.modulated_linear(
            x,
            w0,
            {slot: ("hira", a, b, 1.0, None) for slot, (a, b) in factors.items()},
            segments,
            bias,
        )
        return float((found.double() - truth).abs().max() / truth.abs().max())


def _packed(weights: Mapping[str, QuantizedWeight]) -> dict[str, _Layer]:
    """The layers that the kernel can serve; their bytes are put into its order."""
    layers: dict[str, _Layer] = {}
    shared: dict[int, PackedWeight] = {}  # tied layers have one weight
    for path, weight in weights.items():
        if weight.kind not in ("nf4", "fp4"):
            continue
        address = weight.stored.data_ptr()
        if address in shared:
            weight.grouped = shared[address].grouped
        else:
            assert weight.scales is not None
            try:
                packed = pack_weight(
                    weight.stored, weight.scales, weight.kind, weight.shape, weight.block
                )
            except ShapeMismatch:  # rows of an odd number of inputs
                continue
            shared[address] = weight.take_order(packed)
        layers[path] = _Layer(len(layers), shared[address])
    return layers


def _in_a_line(cause: Exception) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]


def _misaligned(factor: torch.Tensor) -> bool:
    return factor.data_ptr() % ADDRESS_MULTIPLE_BYTES != 0


def _ops() -> Any:
    """The module of the kernels, which imports triton."""
    from adapters.kernels import triton_ops

    return triton_ops


def _one_row_ops() -> Any:
    """The module of the kernel for one row."""
    from adapters.kernels import triton_one_row

    return triton_one_row


def _scratch_ops() -> Any:
    """The module of the kernels that write weights to scratch memory."""
    from adapters.kernels import triton_scratch

    return triton_scratch
