"""The names of the exact strategies, and the fixed rule that stands in before any is timed.

Pure: no torch, no clock, no file. ``adapters.modulation.autotune`` times them;
``adapters.modulation.modulator`` runs what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log2
from typing import Literal, NamedTuple, get_args

Strategy = Literal["auto", "native", "fold", "expand", "cached", "fused", "reference"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Backend = Literal["native", "torch", "triton"]
# How a segment is computed: ``kept`` by its kept folded weight; ``held`` only to be timed, by
# whatever lies in the buffer of folded weights, as if it were kept.
# Of a whole call on a GPU: ``tiles`` by the fused kernel, ``product`` with W0 decoded into scratch
# memory and all factors expanded, ``expanded`` likewise with W0 in registers, ``scratch`` with the
# modulated weight of each slot in memory, ``wide`` by the fused kernel over larger blocks of rows,
# ``row`` by the kernel for a single row.
Computation = Literal[
    "base", "fold", "expand", "kept", "held",
    "tiles", "wide", "product", "expanded", "scratch", "row",
]  # fmt: skip
Candidate = tuple[Backend, Computation]

# Folding is ``rank`` multiply-adds a weight and a pass over the weight; expanding ``rows · rank``.
# The pass takes about as long as so many multiply-adds, on processors from AVX2 to AMX.
_PASS_MULTIPLY_ADDS = 24
# Beyond this many times what the rule expands, expanding is hopeless and not even tried.
_HOPELESS = 8


class Bucket(NamedTuple):
    """Segments whose strategies take about the same time: powers of two of what matters."""

    weights_log2: int
    inputs_log2: int
    storage: str  # of the weight, and the compute dtype
    rows_log2: int  # of a segment
    adapters_log2: int  # segments
    rank_log2: int  # -1: rows of the bare base, and LoRA's, whose products are thin


class SegmentShape(NamedTuple):
    """A segment as a choice sees it."""

    rows: int
    rank: int  # 0: of the bare base, or LoRA
    is_kept: bool = False  # its folded weight is there


class AlikeSegments(NamedTuple):
    """The segments of one call that are alike; ``places`` are their numbers in its table."""

    bucket: Bucket
    largest: SegmentShape
    places: tuple[int, ...]


def default_way(part: SegmentShape) -> Computation:
    """How a segment is computed before its bucket was timed.

    By the kept folded weight where there is one; expanded while ``(rows − 1) · rank`` is at most
    24, which is where a multiply-add for each row and rank overtakes the pass over the weight that
    folding takes; folded beyond.
    """
    if part.rank == 0:
        return "base"
    if part.is_kept:
        return "kept"
    return "expand" if (part.rows - 1) * part.rank <= _PASS_MULTIPLY_ADDS else "fold"


def ways_of(part: SegmentShape) -> tuple[Computation, ...]:
    """What is possible for a segment and not hopeless, best known first."""
    if part.rank == 0:
        return ("base",)
    kept: tuple[Computation, ...] = ("kept",) if part.is_kept else ()
    if (part.rows - 1) * part.rank > _HOPELESS * _PASS_MULTIPLY_ADDS:
        return (*kept, "fold")
    return (*kept, "fold", "expand")


def bucket_of(
    shape: tuple[int, int], storage: str, *, rows: int, adapters: int, rank: int
) -> Bucket:
    """The bucket of a whole call.

    Args:
        shape: ``(out, in)`` of the layer.
        storage: As in :class:`Bucket`.
        rows, adapters: Of the call.
        rank: The largest; 0: all rows are the base's.
    """
    return Bucket(
        _log2(shape[0] * shape[1]),
        _log2(shape[1]),
        storage,
        _log2(rows),
        _log2(adapters),
        _log2(rank) if rank else -1,
    )


@lru_cache(maxsize=8192)
def groups_of(
    shape: tuple[int, int], storage: str, parts: tuple[SegmentShape, ...]
) -> tuple[AlikeSegments, ...]:
    """The segments of a call, sorted into buckets.

    Args:
        shape: ``(out, in)`` of the layer.
        storage: As in :class:`Bucket`.
        parts: The segments, in order.
    """
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for place, part in enumerate(parts):
        rank_log2 = _log2(part.rank) if part.rank else -1
        # All rows of the bare base are one matmul, or nearly, however they are cut.
        rows_log2 = _log2(part.rows) if part.rank else 0
        alike.setdefault((rows_log2, rank_log2, part.is_kept), []).append(place)
    weights_log2, inputs_log2 = _log2(shape[0] * shape[1]), _log2(shape[1])
    groups: list[AlikeSegments] = []
    for (each_log2, rank_log2, _), places in alike.items():
        own: Sequence[SegmentShape] = [parts[place] for place in places]
        total_log2 = _log2(sum(part.rows for part in own))
        rows_log2 = each_log2 if rank_log2 >= 0 else total_log2
        count_log2 = _log2(len(places)) if rank_log2 >= 0 else 0
        bucket = Bucket(weights_log2, inputs_log2, storage, rows_log2, count_log2, rank_log2)
        groups.append(AlikeSegments(bucket, max(own), tuple(places)))
    return tuple(groups)


def _log2(number: int) -> int:
    return round(log2(max(1, number)))
