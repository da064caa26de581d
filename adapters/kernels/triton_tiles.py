"""A batch cut into the tiles that the fused kernel's programs own: pure planning, on the host.

Rows are grouped by slot wherever they lie in the batch. Slots with many rows get tiles of their
own; slots with few share tiles, so that a tile of W0 is decoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adapters.kernels.triton_operands import GROUP_FEATURES, KERNEL_MAX_RANK, FactorTable
from adapters.segments import BASE_SLOT, Segments

RANK_STEPS = (16, 32, 64, KERNEL_MAX_RANK)
# Slots with fewer rows share tiles: with fewer, half of a tile of their own would be padding.
FEW_ROWS = 32
# Rows of a program for many rows of a slot; and of a wide one, which fits the registers of a GPU
# from capability 9.0 on, up to this padded rank.
MANY_BLOCK_ROWS = 128
WIDE_BLOCK_ROWS = 256
WIDE_MAX_RANK = 64
# Shared memory of an A100 or H100; other GPUs since 2018 have 96 KiB or more for a program.
LARGE_SHARED_BYTES = 160 * 1024
# Programs of the few-rows kernel that a multiprocessor should be given to hide its latencies, and
# the parts that a sum of inputs is cut into at most: each costs a float32 row written and read.
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_SPLITS = 16
# Expanded rows of a program of their kernel: those of whole rows, of 1 at rank 128 to 8 at rank 16.
EXPANDED_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class ManyRows:
    """Tiles whose rows are all of one slot; ``rank`` is padded, 0 for the bare base."""

    rank: int
    block_rows: int
    tiles: torch.Tensor  # int32 [count, 3]: slot, first place in ``rows``, how many
    count: int


@dataclass(frozen=True, slots=True)
class FewRows:
    """Tiles of consecutive places in ``rows`` that several slots share."""

    rank: int
    block_rows: int
    rows: torch.Tensor  # int32 [row_count], the rows of x and y
    row_count: int
    entries: torch.Tensor  # int32 [modulated pieces, 3]: slot, first column of its tile, last + 1
    bounds: torch.Tensor  # int32 [tiles + 1]: the entries of each tile
    tiles: int


@dataclass(frozen=True, slots=True)
class TokenTiles:
    """Tiles of one slot each over rows as they lie, as many as a batch of this size can need.

    Those that a batch does not need have no rows.
    """

    rows: torch.Tensor  # int32 [row count], 0, 1, 2, ...
    many: ManyRows


@dataclass(frozen=True, slots=True)
class Launches:
    """Every row of the batch once: ``rows`` int32, the places that the tiles name."""

    rows: torch.Tensor
    many: tuple[ManyRows, ...]
    few: FewRows | None


class BatchTiles:
    """The tiles of one batch, built once and used by every layer of its forward.

    Layers in which the same slots have the same padded ranks share a :class:`Launches`, so a batch
    costs one or two small copies to the device and no synchronization.

    Args:
        segments: Of the rows of x.
        device: Where the kernels run.
        wide: Slots with more than ``MANY_BLOCK_ROWS`` rows have blocks of ``WIDE_BLOCK_ROWS``, up
            to rank ``WIDE_MAX_RANK``: half of the modulations, more registers.
    """

    def __init__(
        self, segments: Segments, device: torch.device | str, *, wide: bool = False
    ) -> None:
        self.segments = segments
        self.wide = wide
        # With its index: "cuda" alone would differ from the device of any tensor.
        self.device = torch.empty(0, device=device).device
        rows: dict[int, list[torch.Tensor]] = {}
        for part in segments.parts:
            span = torch.arange(part.start, part.stop, dtype=torch.int32)
            rows.setdefault(part.slot, []).append(span)
        self._rows = {slot: torch.cat(spans) for slot, spans in rows.items()}
        self._launches: dict[tuple[int, ...], Launches] = {}

    def launches(self, factors: FactorTable, layer: int) -> Launches:
        """The tiles for one layer.

        Raises:
            SlotNotResident: A segment's slot holds nothing.
        """
        ranks = tuple(padded_rank(factors.rank(slot, layer)) for slot in self._rows)
        if ranks not in self._launches:
            self._launches[ranks] = self._build(dict(zip(self._rows, ranks, strict=True)))
        return self._launches[ranks]

    def _build(self, ranks: dict[int, int]) -> Launches:
        # Whatever has no factors in this layer is the bare base: one group.
        groups: dict[int, list[torch.Tensor]] = {}
        for slot, rank in ranks.items():
            groups.setdefault(slot if rank else BASE_SLOT, []).append(self._rows[slot])
        order = [torch.zeros(0, dtype=torch.int32)]
        place = 0
        many: dict[tuple[int, int], list[int]] = {}
        few: list[tuple[int, torch.Tensor]] = []
        for slot, spans in groups.items():
            rows = torch.cat(spans)
            if len(rows) < FEW_ROWS:
                few.append((slot, rows))
                continue
            rank = ranks[slot] if slot != BASE_SLOT else 0
            block_rows = MANY_BLOCK_ROWS if len(rows) > MANY_BLOCK_ROWS // 2 else 64
            if self.wide and len(rows) > MANY_BLOCK_ROWS and rank <= WIDE_MAX_RANK:
                block_rows = WIDE_BLOCK_ROWS
            tiles = many.setdefault((rank, block_rows), [])
            for start in range(0, len(rows), block_rows):
                tiles += (slot, place + start, min(block_rows, len(rows) - start))
            order.append(rows)
            place += len(rows)
        few.sort(key=lambda piece: piece[0])
        order += (rows for _, rows in few)
        block_rows = 16 if sum(len(rows) for _, rows in few) <= 4 * len(few) else 32
        entries, bounds = share_tiles([(slot, len(rows)) for slot, rows in few], block_rows)
        # One copy to the device for everything.
        pieces = [torch.cat(order), *map(_int32, many.values()), _int32(entries), _int32(bounds)]
        blob = torch.cat(pieces).to(self.device)
        views = list(torch.split(blob, [len(piece) for piece in pieces]))
        return Launches(
            rows=views[0],
            many=tuple(
                ManyRows(rank, size, tiles, len(tiles) // 3)
                for (rank, size), tiles in zip(many, views[1:-2], strict=True)
            ),
            few=FewRows(
                rank=max([ranks[slot] for slot, _ in few if slot != BASE_SLOT], default=16),
                block_rows=block_rows,
                rows=views[0][place:],
                row_count=len(views[0]) - place,
                entries=views[-2],
                bounds=views[-1],
                tiles=len(bounds) - 1,
            )
            if few
            else None,
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a kernel is cut: output features and warps of a program, stages of its pipeline."""

    out: int
    warps: int
    stages: int


def many_blocks(rank: int, grouped: bool, shared_bytes: int, rows: int = MANY_BLOCK_ROWS) -> Blocks:
    """The cut of the many-rows kernel for a padded rank and the rows of a program.

    Accumulator, modulation and decoded tile fit the 255 registers of a thread, and what the stages
    hold fits the shared memory; a test compiles each for both generations of tensor cores.
    """
    if not grouped:  # a scale for each byte: no registers to spare for a pipeline
        return Blocks(64, 8, 1)
    if rows > MANY_BLOCK_ROWS:
        return Blocks(128, 8, 2)
    if shared_bytes < LARGE_SHARED_BYTES and rank > 64:
        return Blocks(64, 8, 2)
    return Blocks(128, 8, 2 if rank > 64 or shared_bytes < LARGE_SHARED_BYTES else 3)


def few_blocks(rank: int) -> Blocks:
    """The cut of the few-rows kernel for a padded rank; its pipeline runs over the slots."""
    return Blocks(64, 8, 1) if rank > 64 else Blocks(64, 4, 2)


def one_row_blocks(rank: int) -> Blocks:
    """The cut of the one-row kernel for a padded rank."""
    return Blocks(64, 8, 2) if rank > 64 else Blocks(64, 4, 2)


def expanded_blocks(shared_bytes: int) -> Blocks:
    """The cut of the kernel for expanded rows; its pipeline runs over the inputs."""
    return Blocks(128, 8, 3 if shared_bytes >= LARGE_SHARED_BYTES else 2)


def split_inputs(
    in_features: int,
    programs: int,
    multiprocessors: int,
    *,
    each: int = PROGRAMS_PER_MULTIPROCESSOR,
) -> tuple[int, int]:
    """How many parts to cut the input features into, and the features of each but the last.

    Args:
        in_features: Of the layer.
        programs: That there are without a cut.
        multiprocessors: Of the device.
        each: Programs that a multiprocessor should be given.
    """
    steps = -(-in_features // GROUP_FEATURES)
    wanted = -(-each * multiprocessors // programs)
    # Two steps a part at least: below that a program spends itself on its start.
    splits = max(1, min(wanted, MAX_SPLITS, steps // 2))
    steps_each = -(-steps // splits)
    return -(-steps // steps_each), steps_each * GROUP_FEATURES


def padded_rank(rank: int) -> int:
    """The tile width for a rank: 0, 16, 32, 64 or 128."""
    return next(step for step in (0, *RANK_STEPS) if step >= rank)


def share_tiles(pieces: list[tuple[int, int]], block_rows: int) -> tuple[list[int], list[int]]:
    """Cut ``(slot, rows)`` laid end to end into tiles: flat entries, and where each tile's end.

    Args:
        pieces: In the order of their rows; the base's have no entry.
        block_rows: Of a tile.

    Returns:
        Slot, first column and the one after the last, of every entry; and for each tile where its
        entries begin, then where the last one's end.
    """
    total = sum(count for _, count in pieces)
    entries: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-total // block_rows))]
    start = 0
    for slot, count in pieces:
        stop = start + count
        while slot != BASE_SLOT and start < stop:
            tile, column = divmod(start, block_rows)
            taken = min(stop - start, block_rows - column)
            entries[tile].append((slot, column, column + taken))
            start += taken
        start = stop
    bounds = [0]
    for tile_entries in entries:
        bounds.append(bounds[-1] + len(tile_entries))
    return [number for tile in entries for entry in tile for number in entry], bounds


def slot_tiles(runs: Iterable[tuple[int, int]], block_rows: int) -> list[int]:
    """Cut ``(slot, rows)`` laid end to end into tiles of one slot: flat slot, first row, rows."""
    tiles: list[int] = []
    start = 0
    for slot, count in runs:
        for first in range(start, start + count, block_rows):
            tiles += (slot, first, min(block_rows, start + count - first))
        start += count
    return tiles


def _int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
