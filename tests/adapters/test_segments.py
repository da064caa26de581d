from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import SegmentMismatch
from adapters.segments import Segment, Segments, from_rows, from_runs

slots_of_rows = st.lists(st.integers(0, 4), max_size=40)


@given(slots_of_rows)
def test_grouping_rows_keeps_every_row_and_its_slot(slots: list[int]) -> None:
    segments = from_rows(slots)
    assert segments.row_slots() == slots
    assert segments.rows == len(slots)
    assert segments.slots == tuple(dict.fromkeys(slots))


@given(slots_of_rows)
def test_neighbouring_segments_are_of_different_slots(slots: list[int]) -> None:
    parts = from_rows(slots).parts
    assert all(left.slot != right.slot for left, right in pairwise(parts))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=12))
def test_runs_expand_to_their_rows(runs: list[tuple[int, int]]) -> None:
    assert from_runs(runs).row_slots() == [slot for slot, rows in runs for _ in range(rows)]


@given(slots_of_rows, st.integers(1, 5))
def test_repeating_turns_sequences_into_tokens(slots: list[int], times: int) -> None:
    assert from_rows(slots).repeat(times).row_slots() == [s for s in slots for _ in range(times)]


@given(slots_of_rows.filter(bool))
def test_taking_rows_takes_their_slots(slots: list[int]) -> None:
    rows = [index * 7 % len(slots) for index in range(len(slots) + 3)]
    assert from_rows(slots).take(rows).row_slots() == [slots[row] for row in rows]


@pytest.mark.parametrize(
    "parts",
    [
        (Segment(1, 1, 2),),
        (Segment(1, 0, 0),),
        (Segment(1, 0, 3), Segment(0, 2, 4)),
        (Segment(1, 0, 3), Segment(0, 4, 5)),
        (Segment(-1, 0, 3),),
        (Segment(1, 0, 3), Segment(1, 3, 2)),
    ],
)
def test_segments_that_do_not_follow_each_other_are_refused(parts: tuple[Segment, ...]) -> None:
    with pytest.raises(SegmentMismatch):
        Segments(parts)


@given(slots_of_rows, st.integers(0, 50))
def test_covering_is_exact(slots: list[int], rows: int) -> None:
    segments = from_rows(slots)
    if rows == len(slots):
        segments.check_covers(rows)
        return
    with pytest.raises(SegmentMismatch) as caught:
        segments.check_covers(rows)
    assert caught.value.found
    assert str(len(slots)) in caught.value.found


def test_segments_survive_pickling() -> None:
    segments = from_rows([0, 0, 3, 1])
    assert pickle.loads(pickle.dumps(segments)) == segments
