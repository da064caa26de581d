"""Which row of a step over fixed buffers is of which slot, and the tiles that kernels read of it.

Both live in buffers that stay where they are and are rewritten for each step: ``StaticRows`` for
steps whose rows are of many slots, ``StaticTokens`` for batches in which a slot has many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from adapters.kernels.triton_tiles import (
    FewRows,
    ManyRows,
    TokenTiles,
    share_tiles,
    slot_tiles,
)
from adapters.segments import BASE_SLOT

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

    def all(self) -> list[torch.Tensor]:
        """The memory that every step reads."""
        return [self._all, self._order]

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
