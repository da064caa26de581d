"""The layers that the GPU kernels serve, in steps over fixed buffers: the same launches each time.

Nothing is decided, checked or read on the host while such a step runs. Which form of the kernels
computes a layer is chosen before any step is captured (``adapters.modulation.step_forms``), and the
buffers that forms share are taken then, for they must never move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Final

import torch

from adapters.errors import UnsupportedOption, in_a_line
from adapters.kernels.form_buffers import expanded_buffer, product_buffers
from adapters.kernels.triton_operands import FactorTable, PackedWeight
from adapters.kernels.triton_tiles import FewRows, TokenTiles
from adapters.modulation.gpu_kernels import (
    expanded_kernels,
    row_kernels,
    scratch_kernels,
    tile_kernels,
)
from adapters.modulation.graph_capture import ends_memory
from adapters.modulation.kernel_probe import proved_forms
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
from adapters.modulation.strategy import Computation
from adapters.modulation.workspace import Workspace
from adapters.segments import BASE_SLOT

# Forms that take buffers, those of the largest first: in this order they are given up.
_WITH_BUFFERS: Final[tuple[StepForm, ...]] = ("product", "expanded")

logger = logging.getLogger(__name__)


class FusedSteps:
    """What computes the layers of one model in steps over fixed buffers. One thread uses it.

    Args:
        weights: By layer path, in the kernels' order.
        dtype: The compute dtype.
        device: Where the weights are.
    """

    def __init__(
        self, weights: Mapping[str, PackedWeight], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weights = dict(weights)
        self._dtype = dtype
        self._device = device
        self._forms = StepForms()
        self._buffers = Workspace()
        self._refused: str | None = None  # why no form computes steps
        # 0, 1, 2, ...: where rows are in an answer.
        self._order = torch.arange(max(TIMED_ROWS), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that steps share."""
        return self._buffers.nbytes

    def holds(self, path: str) -> bool:
        """Whether the kernels can serve this layer at all."""
        return path in self._weights

    def serves(self, path: str, x: torch.Tensor) -> bool:
        """Whether the kernels serve this layer for rows of this type and device."""
        return path in self._weights and x.dtype == self._dtype and x.device == self._device

    def form_of(self, path: str, rank: int, rows: int) -> StepForm:
        """What computes so many rows of a layer, with launches that are made for a padded rank."""
        return self._forms.of(self._weights[path].shape, rank, rows)

    def choose(self, most_rows: int, ranks: Sequence[int]) -> None:
        """Time every form on each shape of weight: the steps themselves cannot.

        From now on ``linear`` takes the fastest. A form whose answer is not the fused kernel's, or
        that cannot run, is not used, nor one whose buffers memory does not hold. Where the fused
        kernel itself cannot run, nothing was compared with anything: ``linear`` then refuses.

        Args:
            most_rows: Of a step.
            ranks: Padded, that steps are made for; 0: no HiRA.
        """
        proved = proved_forms(self._dtype, self._device)
        weights = {weight.shape: weight for weight in self._weights.values()}
        chosen: dict[StepCase, StepForm] = {}
        for rows in _timed_rows(most_rows):
            for shape, weight in weights.items():
                for rank in ranks:
                    runs = self._runs(weight, rows, rank, proved)
                    try:
                        chosen[shape, rank, rows] = fastest(runs, self._device)
                    except Exception as cause:  # noqa: BLE001  # a compiler, a driver, memory
                        self._buffers = Workspace()
                        self._refused = (
                            f"{rows} rows of rank {rank} by {shape[0]} x {shape[1]}: "
                            f"{in_a_line(cause)}"
                        )
                        logger.warning("The kernels cannot compute steps: %s", self._refused)
                        return
        self._forms = StepForms(chosen)
        # What was taken for forms that lost is given back, to the device as well: graphs are
        # captured into memory of their own. The rest must never move.
        self._buffers = Workspace()
        torch.cuda.empty_cache()
        for form in _WITH_BUFFERS:
            try:
                self._reserve()
            except torch.OutOfMemoryError:
                logger.warning(
                    "No memory for the buffers of steps by %s: another form computes them. "
                    "Lower kv_bytes or device_bytes to make room.",
                    form,
                )
                self._forms = self._forms.without(form)
                self._buffers = Workspace()
            else:
                return

    def linear(
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

        Raises:
            UnsupportedOption: ``choose`` has found that no form computes rows of many slots here.
            Exception: What the fused kernel raises. Of another form: want of memory, or whatever
                breaks a capture; if it fails otherwise, the fused kernel computes such rows of
                such layers from then on.
        """
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = self._weights[path]
        if isinstance(tiles, TokenTiles):
            y: torch.Tensor = tile_kernels().token_rows_linear(x, weight, table, layer, tiles, bias)
            return y
        if self._refused is not None:
            raise UnsupportedOption(
                "The GPU kernels cannot compute steps over fixed buffers here.",
                found=self._refused,
                expected="a fused kernel that runs, to compare the other forms with",
                fix="Set decode_steps to dynamic: these steps run so already.",
            )
        rows = x.shape[0]
        run = partial(
            self._by_form, x=x, weight=weight, table=table, layer=layer, tiles=tiles, slots=slots,
            rank=rank, bias=bias,
        )  # fmt: skip
        form = self._forms.of(weight.shape, rank, rows)
        if form == "tiles":
            return run(form)
        try:
            return run(form)
        except Exception as cause:
            # What was captured so far is of no use. Want of memory is no fault of the form: who
            # captures steps decides how many of them there is room for.
            if _is_capturing(x.device) or ends_memory(cause):
                raise
            # The buffers stay: steps that are captured already read them.
            self._forms = self._forms.by_tiles(weight.shape, rank, rows)
            logger.warning(
                "The fused kernel computes steps like these (%d rows of rank %d by %d x %d), "
                "%s failed: %s",
                rows, rank, *weight.shape, form, in_a_line(cause),
            )  # fmt: skip
        return run("tiles")

    def add_lora(
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
        tile_kernels().add_lora_rows(y, x, slots, table, scales, layer)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._buffers.take(name, shape, dtype, self._device)

    def _reserve(self) -> None:
        """Take the largest buffers that chosen products need, before any step is captured."""
        for shape, rank, rows in self._forms.cases("product"):
            product_buffers(shape, rows, rank, self._dtype, self._take)
        for shape, rank, rows in self._forms.cases("expanded"):
            expanded_buffer(shape, rows, rank, self._dtype, self._take)

    def _runs(
        self, weight: PackedWeight, rows: int, rank: int, proved: frozenset[Computation]
    ) -> dict[StepForm, Callable[[], torch.Tensor]]:
        """Each form as a call on random rows, as many adapters in them as there usually are."""
        out_features, in_features = weight.shape
        adapters = min(rows, TIMED_ADAPTERS) if rank else 0
        table = FactorTable(adapters + 1, [weight.shape], self._dtype, self._device)
        for slot in range(1, adapters + 1):
            a, b_t = (
                torch.randn(rank, one, device=self._device, dtype=self._dtype)
                for one in (in_features, out_features)
            )
            table.place(slot, {0: (a, b_t.t())})
        made = StaticRows(rows, self._device)
        made.fill([1 + row % adapters if adapters else BASE_SLOT for row in range(rows)])
        made.shape(rows, rank, False)
        x = torch.randn(rows, in_features, device=self._device, dtype=self._dtype)

        def run(form: StepForm) -> Callable[[], torch.Tensor]:
            return lambda: self._by_form(
                form, x=x, weight=weight, table=table.addresses, layer=0, tiles=made.tiles,
                slots=made.slots, rank=rank, bias=None,
            )  # fmt: skip

        runs: dict[StepForm, Callable[[], torch.Tensor]] = {"tiles": run("tiles")}
        if rows == 1 and rank and "row" in proved:
            runs["row"] = run("row")
        if rows * (rank + 1) <= MOST_EXPANDED and "product" in proved:
            runs["product"] = run("product")
        if rank and rows * rank <= MOST_EXPANDED and "expanded" in proved:
            runs["expanded"] = run("expanded")
        return runs

    def _by_form(
        self,
        form: StepForm,
        *,
        x: torch.Tensor,
        weight: PackedWeight,
        table: torch.Tensor,
        layer: int,
        tiles: FewRows,
        slots: torch.Tensor,
        rank: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        y: torch.Tensor
        if form == "row":
            y = row_kernels().one_row_linear(
                x, weight, table, layer, slots,
                rank=tiles.rank, first_row=self._order[:1], bias=bias,
            )  # fmt: skip
        elif form == "product":
            y = scratch_kernels().product_linear(
                x, weight, table, layer, slots, rank=rank, take=self._take, bias=bias
            )
        elif form == "expanded":
            y = expanded_kernels().expanded_linear(
                x, weight, table, layer, slots, rank=rank, order=self._order[: x.shape[0]],
                take=self._take, bias=bias,
            )  # fmt: skip
        else:
            y = tile_kernels().few_rows_linear(x, weight, table, layer, tiles, bias)
        return y


def most_buffer_bytes(
    shapes: Iterable[tuple[int, int]], most_rows: int, ranks: Sequence[int], dtype: torch.dtype
) -> int:
    """What the buffers of steps take at most, whichever forms ``choose`` finds the fastest.

    Args:
        shapes: ``(out, in)`` of the layers.
        most_rows, ranks: As ``choose`` is told.
        dtype: To compute in.
    """
    counted, nowhere = Workspace(), torch.device("meta")

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return counted.take(name, shape, dtype, nowhere)

    for shape in shapes:
        for rows, rank in product(_timed_rows(most_rows), ranks):
            if rows * (rank + 1) <= MOST_EXPANDED:
                product_buffers(shape, rows, rank, dtype, take)
            if 0 < rows * rank <= MOST_EXPANDED:
                expanded_buffer(shape, rows, rank, dtype, take)
    return counted.nbytes


def _timed_rows(most_rows: int) -> list[int]:
    return [one for one in reversed(TIMED_ROWS) if one <= max(1, most_rows)]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
