"""What the exact strategies cost, and which is the cheapest for each segment of a layer call.

Pure arithmetic over measured coefficients: no torch, no clock, no file. The coefficients come from
``adapters.calibration``; who asks, and runs what was chosen, is ``adapters.modulation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal, NamedTuple

Backend = Literal["native", "torch"]
Way = Literal["base", "fold", "expand", "kept"]


@dataclass(frozen=True, slots=True)
class Costs:
    """What one backend takes for layers of one shape class.

    Nanoseconds a call or a segment where the name says so, else nanoseconds a weight of the layer:
    every strategy touches all of them, so its time is proportional to their number.

    Args:
        call_ns: A call, whatever is in it.
        segment_ns: A modulated segment, whatever is in it.
        decode: W0 from 4 bits, once a call that needs it.
        multiply: A matmul, whatever its rows.
        row: A row of a matmul.
        lone_row: A row of a matmul that has at most ``lone_rows`` of them.
        fold: W0 + W0 ⊙ BA of one segment, whatever its rank.
        fold_rank: The same, for each rank.
        expand: An expanded row: a row of a segment times a rank.
        kept: To read a folded weight that was kept; it comes from memory, not from a cache.
        fill: To fold a weight that is to be kept, and write it out.
        granule: Rows of a folded segment are computed in multiples of so many.
        lone_rows: See ``lone_row``.
    """

    call_ns: float
    segment_ns: float
    decode: float
    multiply: float
    row: float
    lone_row: float
    fold: float
    fold_rank: float
    expand: float
    kept: float
    fill: float
    granule: int = 1
    lone_rows: int = 0

    def tiles(self, rows: int) -> float:
        """``rows`` rows times a weight, a weight of it, as a folded segment has them."""
        return self.multiply + self.row * -(-rows // self.granule) * self.granule

    def lines(self, rows: int) -> float:
        """The same of a weight that is there, which a few rows meet line by line."""
        if rows <= self.lone_rows:
            return self.multiply + self.lone_row * rows
        return self.tiles(rows)

    def way_ns(self, way: Way, weights: int, rows: int, rank: int) -> float:
        """A segment computed in one way, what its call shares with others left out."""
        if way == "fold":
            each = self.fold + self.fold_rank * rank + self.tiles(rows)
        elif way == "expand":
            each = self.row * rows + self.expand * rows * rank
        elif way == "kept":
            each = self.kept + self.lines(rows)
        else:
            each = self.row * rows
        return self.segment_ns + each * weights

    def fill_ns(self, weights: int, rank: int) -> float:
        """To make a folded weight that is kept."""
        return (self.fill + self.fold_rank * rank) * weights


class Rows(NamedTuple):
    """A segment as costs see it."""

    rows: int
    rank: int  # 0: of the bare base, or LoRA, whose products are thin whatever is chosen
    is_kept: bool = False  # its folded weight is there


@dataclass(frozen=True, slots=True)
class Choice:
    """How a layer call is computed: by whom, each segment in which way, and the predicted time."""

    backend: Backend
    ways: tuple[Way, ...]
    ns: float


Offers = tuple[tuple[Backend, Costs], ...]  # what each backend that is there takes

_MODULATED: tuple[Way, ...] = ("kept", "fold", "expand")


@lru_cache(maxsize=8192)
def choose(offers: Offers, weights: int, work: tuple[Rows, ...], only: Way | None = None) -> Choice:
    """The cheapest way of every segment, by the backend whose sum is the least.

    Args:
        offers: At least one backend; of equal ones the first is taken.
        weights: Of the layer, in x out.
        work: The segments of the call.
        only: Forces one way for every modulated segment. ``kept`` stands for ``fold`` where the
            weight is not there.
    """
    choices = [_by_one(backend, costs, weights, work, only) for backend, costs in offers]
    return min(choices, key=lambda one: one.ns)


def _by_one(
    backend: Backend, costs: Costs, weights: int, work: tuple[Rows, ...], only: Way | None
) -> Choice:
    ways: list[Way] = []
    total = costs.call_ns
    thin_rows = 0
    needs_base = False
    for part in work:
        if part.rank == 0:
            ways.append("base")
            thin_rows += part.rows
            needs_base = True
            continue
        way = _cheapest(costs, weights, part, only)
        ways.append(way)
        total += costs.way_ns(way, weights, part.rows, part.rank)
        needs_base = needs_base or way != "kept"
    if needs_base:
        total += costs.decode * weights
    if thin_rows:
        # Beside expanded rows they fill up tiles; else they are alone.
        shared = costs.multiply + costs.row * thin_rows
        total += (shared if "expand" in ways else costs.lines(thin_rows)) * weights
    return Choice(backend, tuple(ways), total)


def _cheapest(costs: Costs, weights: int, part: Rows, only: Way | None) -> Way:
    if only == "kept":
        return "kept" if part.is_kept else "fold"
    if only is not None:
        return only
    ways = _MODULATED if part.is_kept else _MODULATED[1:]
    return min(ways, key=lambda way: costs.way_ns(way, weights, part.rows, part.rank))


@lru_cache(maxsize=8192)
def saving_ns(offers: Offers, weights: int, rows: int, rank: int) -> float:
    """What a kept folded weight saves a segment each time; nothing, or less, where it does not."""
    without = min(
        costs.way_ns(way, weights, rows, rank) for _, costs in offers for way in _MODULATED[1:]
    )
    return without - min(costs.way_ns("kept", weights, rows, rank) for _, costs in offers)


class ShapeClass(NamedTuple):
    """Layers whose coefficients are alike: powers of two of their weights and their inputs."""

    weights_log2: int
    inputs_log2: int

    @classmethod
    def of(cls, shape: tuple[int, int]) -> ShapeClass:
        """The class of a layer ``(out, in)``."""
        return cls(round(log2(max(1, shape[0] * shape[1]))), round(log2(max(1, shape[1]))))

    def distance(self, other: ShapeClass) -> int:
        return abs(self.weights_log2 - other.weights_log2) + abs(
            self.inputs_log2 - other.inputs_log2
        )


class CostModel:
    """The costs of every shape class that was measured.

    Args:
        table: At least one class.
    """

    def __init__(self, table: Mapping[ShapeClass, Mapping[Backend, Costs]]) -> None:
        self.table = {key: dict(costs) for key, costs in table.items()}
        self._offers: dict[tuple[tuple[int, int], bool], Offers] = {}

    def offers(self, shape: tuple[int, int], *, has_native: bool) -> Offers:
        """Of the class nearest to a layer ``(out, in)``; torch's alone unless ``has_native``."""
        found = self._offers.get((shape, has_native))
        if found is None:
            own = ShapeClass.of(shape)
            nearest = min(self.table, key=lambda other: (own.distance(other), other))
            found = tuple(
                (backend, costs)
                for backend, costs in sorted(self.table[nearest].items())
                if has_native or backend == "torch"
            )
            self._offers[shape, has_native] = found
        return found


# Where nothing was measured: two cores with AVX512-BF16. What follows from them is exact all the
# same; only its speed may be less than the best.
UNMEASURED = CostModel(
    {
        ShapeClass(20, 10): {
            "native": Costs(
                call_ns=12_000, segment_ns=300, decode=0.018, multiply=0.004, row=0.0051,
                lone_row=0.007, fold=0.055, fold_rank=0.0055, expand=0.0053, kept=0.11,
                fill=0.6, granule=16, lone_rows=8,
            ),
            "torch": Costs(
                call_ns=10_000, segment_ns=25_000, decode=0.075, multiply=0.06, row=0.0051,
                lone_row=0.0051, fold=0.35, fold_rank=0.0055, expand=0.02, kept=0.2, fill=0.6,
            ),
        }
    }
)  # fmt: skip
