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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from adapters.errors import SegmentMismatch
from adapters.kernels.triton_operands import ADDRESS_MULTIPLE_BYTES, KERNEL_MAX_RANK
from adapters.kernels.triton_tiles import (
    FewRows,
    ManyRows,
    TokenTiles,
    padded_rank,
    share_tiles,
    slot_tiles,
)
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.workspace import Workspace
from adapters.segments import BASE_SLOT

if TYPE_CHECKING:
    from adapters.modulation.fused import FusedLayers

COLUMNS: Final = 3  # of a table: addresses of A [r, in] and Bᵀ [r, out], then r; 0: none
TILE_ROWS: Final = 16
TOKEN_TILES: Final = (64, 128)  # rows, below and from so many rows of a batch
_LARGE_BATCH_ROWS: Final = 4096


class StaticRows:
    """Which row is of which slot, in buffers that stay where they are; rewritten by ``fill``.

    Args:
        most: Rows at most.
        device: Of the model.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        tiles = -(-most // TILE_ROWS)
        self._sizes = [most, 3 * most, tiles + 1]
        # A copy to the device may still be under way when the next step is written: two alternate.
        self._host = [torch.zeros(sum(self._sizes), dtype=torch.int32) for _ in range(2)]
        if device.type == "cuda":
            self._host = [one.pin_memory() for one in self._host]
        self._all = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._slots, self._entries, self._bounds = torch.split(self._all, self._sizes)
        self._order = torch.arange(most, dtype=torch.int32, device=device)
        self.rows = most  # of the present step, as a launch sees them
        self.rank = 0  # the padded rank that the launches are made for; 0: no HiRA
        self.has_lora = False

    @property
    def slots(self) -> torch.Tensor:
        """int32 ``[rows]``."""
        return self._slots[: self.rows]

    @property
    def tiles(self) -> FewRows:
        """The tiles as the fused kernel reads them."""
        return FewRows(
            rank=self.rank or 16,
            block_rows=TILE_ROWS,
            rows=self._order[: self.rows],
            row_count=self.rows,
            entries=self._entries,
            bounds=self._bounds,
            tiles=-(-self.rows // TILE_ROWS),
        )

    def shape(self, rows: int, rank: int, has_lora: bool) -> None:
        """Say what the next launches are made for; changes no buffer."""
        self.rows, self.rank, self.has_lora = rows, rank, has_lora

    def fill(self, slots: Sequence[int]) -> None:
        """Write the slots of the rows, those of one slot side by side; the rest are the base's."""
        most = self._sizes[0]
        padded = [*slots, *[BASE_SLOT] * (most - len(slots))]
        runs: list[tuple[int, int]] = []
        for slot in padded:
            if runs and runs[-1][0] == slot:
                runs[-1] = (slot, runs[-1][1] + 1)
            else:
                runs.append((slot, 1))
        entries, bounds = share_tiles(runs, TILE_ROWS)
        entries += [0] * (3 * most - len(entries))
        self._host.reverse()
        self._host[0].copy_(torch.tensor([*padded, *entries, *bounds], dtype=torch.int32))
        self._all.copy_(self._host[0], non_blocking=True)


class StaticTokens:
    """Which row is of which slot where slots have many rows each: tokens of texts; by ``fill``.

    Args:
        most: Rows at most.
        most_runs: Neighbours of one slot at most, those beyond the last row included.
        device: Of the model.
    """

    def __init__(self, most: int, most_runs: int, device: torch.device) -> None:
        self._most_runs = most_runs
        self._sizes = [most, 3 * self._tiles_of(most, min(TOKEN_TILES))]
        self._host = [torch.zeros(sum(self._sizes), dtype=torch.int32) for _ in range(2)]
        if device.type == "cuda":
            self._host = [one.pin_memory() for one in self._host]
        self._all = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._slots, self._tiles = torch.split(self._all, self._sizes)
        self._order = torch.arange(most, dtype=torch.int32, device=device)
        self.rows, self.rank, self.has_lora = most, 0, False  # as of ``StaticRows``

    def all(self) -> list[torch.Tensor]:
        """The memory that every batch reads."""
        return [self._all, self._order]

    @property
    def slots(self) -> torch.Tensor:
        """int32 ``[rows]``."""
        return self._slots[: self.rows]

    @property
    def tiles(self) -> TokenTiles:
        """The tiles as the fused kernel reads them."""
        block_rows = _token_tile(self.rows)
        count = self._tiles_of(self.rows, block_rows)
        many = ManyRows(self.rank, block_rows, self._tiles[: 3 * count], count)
        return TokenTiles(self._order[: self.rows], many)

    def shape(self, rows: int, rank: int, has_lora: bool) -> None:
        """Say what the next launches are made for; changes no buffer."""
        self.rows, self.rank, self.has_lora = rows, rank, has_lora

    def fill(self, runs: Sequence[tuple[int, int]], rows: int) -> None:
        """Write the slots of ``rows`` rows and their tiles.

        Args:
            runs: Slot and how many rows, in order; the rest are the base's.
            rows: As ``shape`` is told.

        Raises:
            ValueError: More runs, or more rows, than there is room for.
        """
        joined: list[list[int]] = []
        for slot, count in [*runs, (BASE_SLOT, rows - sum(count for _, count in runs))]:
            if joined and joined[-1][0] == slot:
                joined[-1][1] += count
            elif count:
                joined.append([slot, count])
        if len(joined) > self._most_runs or any(count < 0 for _, count in joined):
            raise ValueError(f"{len(joined)} runs of slots in {rows} rows: there is no room.")
        slots = [slot for slot, count in joined for _ in range(count)]
        tiles = slot_tiles([(slot, count) for slot, count in joined], _token_tile(rows))
        self._host.reverse()
        host = self._host[0].zero_()
        host[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
        host[self._sizes[0] :][: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
        self._all.copy_(host, non_blocking=True)

    def _tiles_of(self, rows: int, block_rows: int) -> int:
        """Tiles that ``rows`` rows can need: each run has one that is not full at most."""
        return -(-rows // block_rows) + min(rows, self._most_runs)


def _token_tile(rows: int) -> int:
    """Rows of a tile: few texts are many slots' more often than many are."""
    return TOKEN_TILES[rows >= _LARGE_BATCH_ROWS]


class StaticLayers:
    """The linear layers of one model, and the tables of all slots.

    One thread runs forwards. ``place`` and ``clear`` may run in another, for slots that no running
    batch uses.

    Args:
        weights: By layer path, every linear layer.
        slots: How many there will ever be, slot 0 (the bare base) included.
        dtype: To compute in.
        device: Of the weights.
        fused: The layers that the fused kernel serves; None: torch operators compute all of them.
    """

    def __init__(
        self,
        weights: Mapping[str, QuantizedWeight],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: FusedLayers | None = None,
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
        """Bytes of the tables."""
        return self.hira.nbytes + self.lora.nbytes + self.scales.nbytes

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
            y = self.fused.rows_by_address(
                path, x, self.hira, layer=place, tiles=rows.tiles, slots=rows.slots, bias=bias
            )
            if rows.has_lora:
                self.fused.add_lora_by_address(
                    y, x, rows.slots, self.lora, scales=self.scales, layer=place
                )
            return y
        weight = self._weights[path]
        w0 = self._workspace.dequantized(weight, x.dtype)
        y = F.linear(x, w0, bias)
        if rows.rank or rows.has_lora:
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
            if entry.a.device.type == "cuda":
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
