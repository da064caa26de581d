from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.costs import (
    UNMEASURED,
    Backend,
    Costs,
    Offers,
    Rows,
    ShapeClass,
    Way,
    choose,
    saving_ns,
)

positive = st.floats(0.0, 1e3, allow_nan=False)
MODULATED: tuple[Way, ...] = ("fold", "expand", "kept")
PLAIN = UNMEASURED.offers((64, 64), has_native=False)[0][1]
MEASURED = [field.name for field in fields(Costs) if field.name not in {"granule", "lone_rows"}]


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    sizes = {name: draw(positive) for name in MEASURED}
    return replace(
        PLAIN, **sizes, granule=draw(st.sampled_from([1, 16])), lone_rows=draw(st.integers(0, 8))
    )


@st.composite
def offers(draw: st.DrawFn) -> Offers:
    backends: list[Backend] = draw(st.sampled_from([["native", "torch"], ["torch"], ["native"]]))
    return tuple((backend, draw(costs())) for backend in backends)


rows = st.builds(Rows, st.integers(1, 400), st.sampled_from([0, 1, 8, 32, 128]), st.booleans())
work = st.lists(rows, max_size=6).map(tuple)
weights = st.sampled_from([64, 768 * 768, 4096 * 4096])


@given(offers(), weights, work)
def test_every_modulated_segment_gets_its_cheapest_way(
    offered: Offers, count: int, segments: tuple[Rows, ...]
) -> None:
    choice = choose(offered, count, segments)
    own = dict(offered)[choice.backend]
    assert len(choice.ways) == len(segments)
    for part, way in zip(segments, choice.ways, strict=True):
        if part.rank == 0:
            assert way == "base"
            continue
        possible = MODULATED if part.is_kept else MODULATED[:2]
        assert way in possible
        least = min(own.way_ns(other, count, part.rows, part.rank) for other in possible)
        assert own.way_ns(way, count, part.rows, part.rank) == least


@given(offers(), weights, work)
def test_no_other_backend_is_predicted_to_be_faster(
    offered: Offers, count: int, segments: tuple[Rows, ...]
) -> None:
    choice = choose(offered, count, segments)
    alone = [choose((one,), count, segments).ns for one in offered]
    assert choice.ns == min(alone)


@given(offers(), weights, work)
def test_the_choice_is_a_pure_function(
    offered: Offers, count: int, segments: tuple[Rows, ...]
) -> None:
    again = tuple((backend, replace(one)) for backend, one in offered)
    assert choose(again, count, segments) == choose(offered, count, segments)
    assert choose.__wrapped__(offered, count, segments) == choose(offered, count, segments)


@given(costs(), weights, work)
def test_of_equal_backends_the_first_is_taken(
    one: Costs, count: int, segments: tuple[Rows, ...]
) -> None:
    assert choose((("native", one), ("torch", one)), count, segments).backend == "native"
    assert choose((("torch", one), ("native", one)), count, segments).backend == "torch"


@given(offers(), weights, work, st.sampled_from(MODULATED))
def test_a_forced_way_wins(
    offered: Offers, count: int, segments: tuple[Rows, ...], only: Way
) -> None:
    ways = choose(offered, count, segments, only).ways
    for part, way in zip(segments, ways, strict=True):
        if part.rank == 0:
            assert way == "base"
        elif only == "kept" and not part.is_kept:
            assert way == "fold"
        else:
            assert way == only


@given(offers(), weights, st.integers(1, 400), st.sampled_from([1, 8, 32, 128]))
def test_a_saving_is_what_the_choice_would_gain(
    offered: Offers, count: int, each: int, rank: int
) -> None:
    def least(possible: tuple[Way, ...]) -> float:
        return min(
            one.way_ns(way, count, each, rank) for (_, one), way in product(offered, possible)
        )

    expected = least(("fold", "expand")) - least(("kept",))
    assert saving_ns(offered, count, each, rank) == expected


@pytest.mark.parametrize("shape", [(768, 768), (1, 64), (11008, 4096)])
def test_a_shape_that_was_not_measured_gets_the_nearest_class(shape: tuple[int, int]) -> None:
    both = UNMEASURED.offers(shape, has_native=True)
    assert [backend for backend, _ in both] == ["native", "torch"]
    assert [name for name, _ in UNMEASURED.offers(shape, has_native=False)] == ["torch"]


def test_shape_classes_are_powers_of_two() -> None:
    assert ShapeClass.of((768, 768)) == ShapeClass(19, 10)
    assert ShapeClass.of((3072, 768)).distance(ShapeClass.of((768, 3072))) == 2


# Milliseconds of whole layer calls as they were measured, torch operators alone on two cores: a
# square layer's width, the rank, adapters x rows each, then fold, expand and kept.
Recorded = tuple[int, int, int, int, dict[Way, float]]
RECORDED: tuple[Recorded, ...] = (
    (768, 32, 8, 256, {"fold": 8.3, "kept": 6.3}),
    (768, 32, 16, 1, {"fold": 4.7, "expand": 3.3, "kept": 0.83}),
    (2048, 8, 16, 1, {"fold": 17.6, "expand": 5.6, "kept": 6.8}),
    (2048, 32, 8, 1, {"fold": 13.6, "expand": 9.5, "kept": 4.0}),
)
# What follows from them for a weight of each width; no call and no segment costs anything beside.
FITTED = {
    width: replace(
        PLAIN, call_ns=0.0, segment_ns=0.0, decode=decode, multiply=0.0, row=0.0051,
        lone_row=0.0051, fold=fold, fold_rank=0.0054, expand=expand, kept=kept,
    )
    for width, decode, fold, expand, kept in (
        (768, 0.36, 0.3, 0.0102, 0.083), (2048, 0.2, 0.207, 0.0083, 0.105),
    )
}  # fmt: skip
AT_MOST = 1.25


@pytest.mark.parametrize("case", RECORDED)
def test_predictions_are_near_what_was_recorded(
    case: Recorded,
) -> None:
    width, rank, adapters, each, ms = case
    for way, recorded in ms.items():
        work = (Rows(each, rank, way == "kept"),) * adapters
        choice = choose((("torch", FITTED[width]),), width * width, work, way)
        assert choice.ways == (way,) * adapters
        assert choice.ns / 1e6 == pytest.approx(recorded, rel=0.15)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("case", RECORDED)
def test_the_choice_is_near_the_best_that_was_recorded(case: Recorded, is_kept: bool) -> None:
    width, rank, adapters, each, ms = case
    work = (Rows(each, rank, is_kept),) * adapters
    ways = set(choose((("torch", FITTED[width]),), width * width, work).ways)
    (way,) = ways
    best = min(recorded for other, recorded in ms.items() if is_kept or other != "kept")
    assert ms.get(way, float("inf")) <= AT_MOST * best
