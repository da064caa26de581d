"""A model's linear layers on the GPU kernels: what they read of them, and which form computes.

The kernel (``adapters.kernels.triton_ops``) takes HiRA rows and rows of the bare base, straight
from 4-bit storage. Around it, here, are LoRA's two thin products and the biases that adapters
bring. What it does not take (a weight that is not 4-bit, a rank above 128, rows of another type) is
left to the modulator, which computes it by the torch operators, segment by segment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from adapters.errors import UnsupportedOption, in_a_line
from adapters.kernels import torch_ops
from adapters.kernels.triton_operands import (
    ADDRESS_MULTIPLE_BYTES,
    KERNEL_MAX_RANK,
    FactorTable,
    PackedWeight,
)
from adapters.kernels.triton_tiles import (
    MANY_BLOCK_ROWS,
    WIDE_MAX_RANK,
    BatchTiles,
    padded_rank,
)
from adapters.modulation.autotune import Autotuner
from adapters.modulation.chosen_forms import TILES, CallKind, ChosenForms
from adapters.modulation.fused_steps import FusedSteps
from adapters.modulation.gpu_kernels import (
    expanded_kernels,
    row_kernels,
    scratch_kernels,
    tile_kernels,
)
from adapters.modulation.kernel_probe import obstacle, proved_forms
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.packed_layers import packed_layers
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.step_forms import MOST_EXPANDED
from adapters.modulation.strategy import Candidate, bucket_of
from adapters.modulation.workspace import Workspace
from adapters.segments import Segments

_FIRST_SLOTS = 17
# Segment tables of one forward: tokens (once more in wide tiles), sequences, logits, some to spare,
# and each of the bare base.
_TILES_KEPT = 12
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
        self._ops = tile_kernels()
        packed = packed_layers(weights)
        self._layers = {path: _Layer(at, one) for at, (path, one) in enumerate(packed.items())}
        # With its index: "cuda" alone would differ from the device of any tensor.
        self.device = torch.empty(0, device=device).device
        shapes = [layer.weight.shape for layer in self._layers.values()]
        self._table = FactorTable(_FIRST_SLOTS, shapes, dtype, self.device)
        self._tiles: list[BatchTiles] = []  # latest last
        self._chosen = ChosenForms(proved_forms(dtype, self.device))
        # 0, 1, 2, ...: where rows are in an answer.
        self._order = torch.arange(MOST_EXPANDED // 16, dtype=torch.int32, device=self.device)
        self.steps = FusedSteps(packed, dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that calls share, of the forms that were chosen, and of tables."""
        return self._chosen.buffer_bytes + self._order.nbytes + self._table.addresses.nbytes

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

    def gives_up(self, path: str, error: Exception) -> bool:
        """Whether a kernel itself has failed at a layer, which it then no longer serves.

        Args:
            path: Of the layer.
            error: What ``linear`` raised.
        """
        refused = isinstance(error, RuntimeError) and str(error).startswith(
            self._ops.REFUSED_LAUNCH
        )
        if not (refused or isinstance(error, self._ops.KernelFailure)):
            return False
        self._layers.pop(path, None)
        logger.warning(
            "Torch computes %s from now on, the fused kernel failed: %s", path, in_a_line(error)
        )
        return True

    def linear(
        self, call: LayerCall, tuner: Autotuner | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Compute a call that ``takes`` holds for, but for the segments that the kernel does not.

        Args:
            call: Its factors are as ``place`` gave them.
            tuner: What has timed the forms of the equation; until it has, and without it, the fused
                kernel computes all, and what ``chosen_forms`` has not compared with it always.

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
        call = call if bias is call.bias else replace(call, bias=bias)
        if tuner is None:
            return self.forms(call)[TILES]()
        ranks = [self._table.rank(part.slot, layer.index) for part in call.segments.parts]
        kind = CallKind(
            bucket_of(
                call.weight.shape,
                f"{call.weight.kind} {str(call.x.dtype).removeprefix('torch.')} call",
                rows=call.x.shape[0],
                adapters=max(1, sum(rank > 0 for rank in ranks)),
                rank=max(ranks, default=0),
            ),
            call.weight.shape,
            (layer.weight.grouped, layer.weight.block),
            frozenset(map(padded_rank, ranks)),
            bias is not None,
        )
        return self._chosen.compute(kind, partial(self.forms, call), tuner)

    def forms(
        self, call: LayerCall, workspace: Workspace | None = None
    ) -> dict[Candidate, Callable[[], torch.Tensor]]:
        """Every form of a call that ``takes`` holds for and that is not hopeless.

        Args:
            call: Its factors are as ``place`` gave them.
            workspace: Whose buffers they take; None: some of their own.
        """
        room = workspace or Workspace()
        layer, bias = self._layers[call.path], call.bias
        x = call.x if call.x.stride(-1) == 1 else call.x.contiguous()
        parts = call.segments.parts
        ranks = [padded_rank(self._table.rank(part.slot, layer.index)) for part in parts]
        rank = max(ranks, default=0)
        where = (layer.weight, self._table.addresses, layer.index)

        def by_tiles(wide: bool = False) -> torch.Tensor:
            tiles = self._tiles_of(call.segments, wide=wide)
            y: torch.Tensor = self._ops.hira_linear(
                x, layer.weight, self._table, layer.index, tiles, bias=bias
            )
            return y

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return room.take(name, shape, dtype, x.device)

        @cache
        def row_slots() -> torch.Tensor:
            # Once: a captured launch must not copy from the host.
            return torch.tensor(call.segments.row_slots(), dtype=torch.int32).to(x.device)

        def by_product() -> torch.Tensor:
            y: torch.Tensor = scratch_kernels().product_linear(
                x, *where, row_slots(), rank=rank, take=take, bias=bias
            )
            return y

        def by_expanded() -> torch.Tensor:
            y: torch.Tensor = expanded_kernels().expanded_linear(
                x, *where, row_slots(), rank=rank, order=self._order[: x.shape[0]], take=take,
                bias=bias,
            )  # fmt: skip
            return y

        def by_scratch() -> torch.Tensor:
            pieces = [
                (part.slot, own, part.start, part.stop)
                for part, own in zip(parts, ranks, strict=True)
            ]
            y: torch.Tensor = scratch_kernels().scratch_linear(
                x, *where, pieces, take=take, bias=None if bias is None else bias.to(x.dtype)
            )
            return y

        def by_row() -> torch.Tensor:
            y: torch.Tensor = row_kernels().one_row_linear(
                x, *where, row_slots(), rank=rank, first_row=self._order[:1], bias=bias
            )
            return y

        runs: dict[Candidate, Callable[[], torch.Tensor]] = {TILES: by_tiles}
        if x.shape[0] == 1 and rank:
            runs["triton", "row"] = by_row
        if x.shape[0] * (rank + 1) <= MOST_EXPANDED:
            runs["triton", "product"] = by_product
        if rank and x.shape[0] * rank <= MOST_EXPANDED:
            runs["triton", "expanded"] = by_expanded
        if layer.weight.grouped and any(
            part.rows > MANY_BLOCK_ROWS and own <= WIDE_MAX_RANK
            for part, own in zip(parts, ranks, strict=True)
        ):
            runs["triton", "wide"] = partial(by_tiles, wide=True)
        if x.shape[0] >= _LEAST_ROWS_OF_A_SLOT * len(parts):
            runs["triton", "scratch"] = by_scratch
        return runs

    def _tiles_of(self, segments: Segments, *, wide: bool) -> BatchTiles:
        """The tiles of a segment table, made once for the many layers of a forward."""
        for tiles in reversed(self._tiles):
            if tiles.segments is segments and tiles.wide == wide:
                return tiles
        tiles = BatchTiles(segments, self.device, wide=wide)
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


def _misaligned(factor: torch.Tensor) -> bool:
    return factor.data_ptr() % ADDRESS_MULTIPLE_BYTES != 0
