"""Rows of a mixed batch, grouped by the adapter slot that they belong to.

A batch reaches a layer as a matrix of rows (one per token, or one per sequence). A segment is a run
of consecutive rows of one slot; slot 0 is the bare base. This module is pure: no torch, no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from adapters.errors import SegmentMismatch

BASE_SLOT = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``start`` (included) to ``stop`` (excluded) belong to ``slot``; 0 is the bare base."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments that cover rows 0 to ``rows`` without gap or overlap, in order."""

    parts: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return self.parts[-1].stop if self.parts else 0

    @property
    def slots(self) -> tuple[int, ...]:
        """The distinct slots, in order of first appearance."""
        return tuple(dict.fromkeys(part.slot for part in self.parts))

    def __post_init__(self) -> None:
        if self.parts and self.parts[0].start != 0:
            raise SegmentMismatch(
                "The first segment does not start at row 0.",
                found=f"start {self.parts[0].start}",
                expected="0",
            )
        for part in self.parts:
            if part.stop <= part.start or part.slot < 0:
                raise SegmentMismatch(
                    "A segment is empty, runs backwards or has a negative slot.",
                    found=f"slot {part.slot}, rows {part.start} to {part.stop}",
                    expected="slot >= 0 and start < stop",
                )
        for left, right in pairwise(self.parts):
            if left.stop != right.start:
                raise SegmentMismatch(
                    "Consecutive segments leave a gap or overlap.",
                    found=f"a segment ends at {left.stop}, the next starts at {right.start}",
                    expected="each segment starts where the one before it ends",
                )

    def check_covers(self, rows: int) -> None:
        """Raise SegmentMismatch unless the segments cover exactly ``rows`` rows."""
        if self.rows != rows:
            raise SegmentMismatch(
                "The segments do not cover the rows of the batch.",
                found=f"{self.rows} rows in the segments",
                expected=f"{rows} rows",
            )

    def repeat(self, times: int) -> Segments:
        """The same batch with every row repeated ``times`` times: sequences become tokens."""
        return Segments(tuple(Segment(p.slot, p.start * times, p.stop * times) for p in self.parts))

    def take(self, rows: Sequence[int]) -> Segments:
        """The segments of the chosen ``rows``, in the order given."""
        slots = self.row_slots()
        return from_rows(slots[row] for row in rows)

    def row_slots(self) -> list[int]:
        """The slot of each row."""
        return [part.slot for part in self.parts for _ in range(part.rows)]


def from_rows(slots: Iterable[int]) -> Segments:
    """Group the slot of each row into segments: ``[0, 0, 3] -> (0: 0..2), (3: 2..3)``."""
    return from_runs((slot, 1) for slot in slots)


def from_runs(runs: Iterable[tuple[int, int]]) -> Segments:
    """Group ``(slot, rows)`` runs into segments; neighbours of one slot are joined."""
    parts: list[Segment] = []
    start = 0
    for slot, rows in runs:
        stop = start + rows
        if parts and parts[-1].slot == slot:
            parts[-1] = Segment(slot, parts[-1].start, stop)
        else:
            parts.append(Segment(slot, start, stop))
        start = stop
    return Segments(tuple(parts))
