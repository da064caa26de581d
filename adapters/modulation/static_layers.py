"""A model's linear layers with nothing decided on the host: each row finds its factors by address.

    y[t] = x[t] (W0 ⊙ (1 + B_s A_s))ᵀ + bias     HiRA,  s the slot of row t
    y[t] = x[t] W0ᵀ + s x[t] A_sᵀ B_sᵀ + bias     LoRA

Which row is of which slot, and where the factors of a slot lie, is read from buffers and tables
that stay where they are. So the launches of a step are the same for any mixture of adapters, and
loading, replacing or dropping one changes numbers in a table and no launch. What cannot be computed
so is named by ``obstacle``; the caller then takes ``adapters.modulation.modulator``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from adapters.errors import SegmentMismatch
from adapters.kernels.triton_operands import ADDRESS_MULTIPLE_BYTES, KERNEL_MAX_RANK
from adapters.kernels.triton_tiles import padded_rank
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.static_rows import StaticRows, StaticTokens
from adapters.modulation.workspace import Workspace
from adapters.segments import BASE_SLOT

if TYPE_CHECKING:
    from adapters.modulation.fused_steps import FusedSteps

COLUMNS: Final = 3  # of a table: addresses of A [r, in] and Bᵀ [r, out], then r; 0: none


class StaticLayers:
    """The linear layers of one model, and the tables of all slots.

    One thread runs forwards. ``place`` and ``clear`` may run in another, for slots that no running
    batch uses.

    Args:
        weights: By layer path, every linear layer.
        slots: How many there will ever be, slot 0 (the bare base) included.
        dtype: To compute in.
        device: Of the weights.
        fused: The layers that the GPU kernels serve; None: torch operators compute all of them.
    """

    def __init__(
        self,
        weights: Mapping[str, QuantizedWeight],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: FusedSteps | None = None,
    ) -> None:
        self.slots = slots
        self.dtype = dtype
        self.fused = fused
        self.rows: StaticRows | StaticTokens | None = None  # None: no static step is under way
        self._index = {path: place for place, path in enumerate(weights)}
        self._weights = dict(weights)
        shape = (slots, max(1, len(weights)), COLUMNS)
        self.hira = torch.zeros(shape, dtype=torch.int64, device=device)
        self.lora = torch.zeros(shape, dtype=torch.int64, device=device)
        self.scales = torch.zeros(shape[:2], dtype=torch.float32, device=device)
        self._obstacles: dict[int, str] = {}
        self._ranks: dict[int, int] = {BASE_SLOT: 0}
        self._with_lora: set[int] = set()
        self._alive: dict[int, list[torch.Tensor]] = {}
        self._workspace = Workspace()

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, and of the buffers that the kernels of steps share."""
        shared = 0 if self.fused is None else self.fused.nbytes
        return self.hira.nbytes + self.lora.nbytes + self.scales.nbytes + shared

    def obstacle(self, slot: int) -> str | None:
        """Why rows of a slot cannot be in a static step: one of few words, for a metric."""
        if slot != BASE_SLOT and slot not in self._ranks:
            return self._obstacles.get(slot, "slot")
        return self._obstacles.get(slot)

    def serves(self, path: str) -> bool:
        """Whether a static step can have factors in this layer at all."""
        return self.fused is None or self.fused.holds(path)

    def rank(self, slot: int) -> int:
        """The padded HiRA rank that the launches need for a slot."""
        return self._ranks[slot]

    def has_lora(self, slot: int) -> bool:
        return slot in self._with_lora

    def place(self, slot: int, factors: Mapping[str, SlotFactors]) -> None:
        """Note where an adapter's factors lie; what was noted of the slot is gone.

        Args:
            slot: 1 or more.
            factors: As they lie on the device. B is copied where its transpose is not contiguous.
        """
        self.clear(slot)
        reason = "slot" if slot >= self.slots else self._reason(factors)
        if reason is not None:
            self._obstacles[slot] = reason
            return
        rows = {"hira": [[0] * COLUMNS for _ in self._index]}
        rows["lora"] = [[0] * COLUMNS for _ in self._index]
        scales = [0.0] * len(self._index)
        alive: list[torch.Tensor] = []
        rank = 0
        for path, entry in factors.items():
            b_t = entry.b.t().contiguous()
            alive += (entry.a, b_t)
            place = self._index[path]
            rows[entry.method][place] = [entry.a.data_ptr(), b_t.data_ptr(), entry.rank]
            if entry.method == "lora":
                scales[place] = entry.scale
                self._with_lora.add(slot)
            else:
                rank = max(rank, padded_rank(entry.rank))
        self.hira[slot].copy_(torch.tensor(rows["hira"], dtype=torch.int64))
        self.lora[slot].copy_(torch.tensor(rows["lora"], dtype=torch.int64))
        self.scales[slot].copy_(torch.tensor(scales, dtype=torch.float32))
        self._ranks[slot] = rank
        self._alive[slot] = alive

    def clear(self, slot: int) -> None:
        """Empty a slot that no batch uses; an empty one stays empty."""
        self._obstacles.pop(slot, None)
        self._with_lora.discard(slot)
        if self._ranks.pop(slot, None) is not None and 0 < slot < self.slots:
            self.hira[slot].zero_()
            self.lora[slot].zero_()
        self._alive.pop(slot, None)

    def linear(
        self, path: str, x: torch.Tensor, bias: torch.Tensor | None, rows: StaticRows | StaticTokens
    ) -> torch.Tensor:
        """One layer for the rows of a step: a new ``[rows, out]`` in the dtype of ``x``.

        Args:
            path: Of the layer.
            x: ``[rows, in]``.
            bias: ``[out]`` in the dtype of ``x``, or None.
            rows: Whose ``shape`` the launches are made for.

        Raises:
            SegmentMismatch: ``x`` has another number of rows.
        """
        if x.shape[0] != rows.rows:
            raise SegmentMismatch(
                "A layer of a static step was given rows that nobody knows the slots of.",
                found=f"{x.shape[0]} rows in {path}",
                expected=f"{rows.rows}",
            )
        place = self._index[path]
        tables = (self.hira, self.lora, self.scales)
        if self.fused is not None and self.fused.serves(path, x):
            y = self.fused.linear(
                path, x, self.hira, layer=place, tiles=rows.tiles, slots=rows.slots,
                rank=rows.rank, bias=bias,
            )  # fmt: skip
            if rows.has_lora:
                self.fused.add_lora(y, x, rows.slots, self.lora, scales=self.scales, layer=place)
            return y
        weight = self._weights[path]
        w0 = self._workspace.dequantized(weight, x.dtype)
        y = F.linear(x, w0, bias)
        # On a GPU no adapter of a static step has factors in a layer without the kernel.
        if (rows.rank or rows.has_lora) and x.device.type == "cpu":
            torch.ops.hira.add_by_address(y, x, w0, rows.slots, *tables, place)
        return y

    def _reason(self, factors: Mapping[str, SlotFactors]) -> str | None:
        for path, entry in factors.items():
            if path not in self._index:
                return "layer"
            if entry.bias is not None:
                return "bias"
            if not 1 <= entry.rank <= KERNEL_MAX_RANK:
                return "rank"
            if entry.a.dtype != self.dtype or not entry.a.is_contiguous():
                return "factors"
            if self.fused is None and entry.a.device.type == "cpu":
                continue  # torch operators serve every layer there
            if self.fused is None or not self.fused.holds(path):
                return "storage"
            if entry.a.data_ptr() % ADDRESS_MULTIPLE_BYTES:
                return "factors"
        return None


def _tensor_at(address: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies at an address of this process's memory; it is not owned."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    held = (ctypes.c_char * nbytes).from_address(address)
    return torch.frombuffer(held, dtype=dtype).view(shape)


@torch.library.custom_op("hira::add_by_address", mutates_args=("y",), device_types="cpu")
def _add_by_address(  # noqa: PLR0917  # an operator has no named parameters
    y: torch.Tensor,
    x: torch.Tensor,
    w0: torch.Tensor,
    slots: torch.Tensor,
    hira: torch.Tensor,
    lora: torch.Tensor,
    scales: torch.Tensor,
    layer: int,
) -> None:
    """What the adapters add to ``x W0ᵀ``: on a CPU, whose memory is the tables' own.

    One launch to whoever counts them, as the kernels are on a GPU, which read the same tables.

    Args:
        y: ``[rows, out]``, added to.
        x: ``[rows, in]``.
        w0: ``[out, in]``.
        slots: int32 ``[rows]``.
        hira, lora: int64 ``[slots, layers, 3]``.
        scales: float32 ``[slots, layers]``, of LoRA.
        layer: Its place in the tables.
    """
    own = slots.tolist()
    for slot in dict.fromkeys(own):
        rows = torch.tensor([row for row, one in enumerate(own) if one == slot])
        a_at, b_at, rank = hira[slot, layer].tolist()
        if rank:
            a = _tensor_at(a_at, (rank, x.shape[1]), x.dtype)
            b_t = _tensor_at(b_at, (rank, y.shape[1]), x.dtype)
            z = (x[rows].unsqueeze(1) * a).view(-1, x.shape[1])
            terms = (z @ w0.t()).view(len(rows), rank, -1)
            y[rows] += (terms * b_t).sum(dim=1)
        a_at, b_at, rank = lora[slot, layer].tolist()
        if rank:
            a = _tensor_at(a_at, (rank, x.shape[1]), x.dtype)
            b_t = _tensor_at(b_at, (rank, y.shape[1]), x.dtype)
            y[rows] += (x[rows] @ a.t() @ b_t) * float(scales[slot, layer])
