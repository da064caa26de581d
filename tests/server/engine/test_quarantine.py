"""Quarantine: who is not tried for a while, and how they come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.quarantine import LONGEST_S, REMEMBERED, WINDOW_S, Quarantine


def fail(quarantine: Quarantine, times: int, now: float, version: str = "v") -> list[bool]:
    return [quarantine.failed(version, "NaN", now) for _ in range(times)]


def test_failures_in_a_row_quarantine_a_version_and_no_other() -> None:
    quarantine = Quarantine(3, 10.0)
    assert fail(quarantine, 3, now=1.0) == [False, False, True]
    entry = quarantine.entry("v", 2.0)
    assert entry is not None
    assert (entry.left_s, entry.reason) == (9.0, "NaN")
    assert quarantine.entry("w", 2.0) is None
    assert set(quarantine.entries(2.0)) == {"v"}
    assert quarantine.total == 1


def test_success_in_between_starts_the_count_anew() -> None:
    quarantine = Quarantine(3, 10.0)
    for _ in range(10):
        assert fail(quarantine, 2, now=1.0) == [False, False]
        quarantine.succeeded("v")
    assert quarantine.entry("v", 1.0) is None


def test_failures_far_apart_are_not_in_a_row() -> None:
    quarantine = Quarantine(2, 10.0)
    for at in range(5):
        assert fail(quarantine, 1, now=at * (WINDOW_S + 1)) == [False]


def test_time_brings_probation_and_the_next_failure_twice_the_time() -> None:
    quarantine = Quarantine(3, 10.0)
    fail(quarantine, 3, now=0.0)
    assert quarantine.entry("v", 9.9) is not None
    assert quarantine.entry("v", 10.0) is None
    assert fail(quarantine, 1, now=11.0) == [True]
    entry = quarantine.entry("v", 11.0)
    assert entry is not None
    assert entry.left_s == 20.0
    for _ in range(20):  # never longer than the longest
        now = 11.0 + 2 * LONGEST_S
        quarantine.entry("v", now)
        fail(quarantine, 1, now)
        entry = quarantine.entry("v", now)
        assert entry is not None
        assert entry.left_s <= LONGEST_S
        quarantine.release("v")
        fail(quarantine, 3, 0.0)


def test_probation_that_goes_well_clears_the_record() -> None:
    quarantine = Quarantine(3, 10.0)
    fail(quarantine, 3, now=0.0)
    assert quarantine.entry("v", 10.0) is None
    quarantine.succeeded("v")
    assert fail(quarantine, 2, now=11.0) == [False, False]


def test_late_answers_of_requests_under_way_change_no_sentence() -> None:
    quarantine = Quarantine(2, 10.0)
    fail(quarantine, 2, now=0.0)
    quarantine.succeeded("v")
    assert fail(quarantine, 5, now=1.0) == [False] * 5
    entry = quarantine.entry("v", 1.0)
    assert entry is not None
    assert entry.left_s == 9.0


def test_lifting_forgets_everything() -> None:
    quarantine = Quarantine(2, 10.0)
    assert not quarantine.release("v")
    fail(quarantine, 2, now=0.0)
    assert quarantine.release("v")
    assert quarantine.entry("v", 0.0) is None
    assert fail(quarantine, 1, now=0.0) == [False]


def test_memory_is_bounded() -> None:
    quarantine = Quarantine(2, 10.0)
    for number in range(REMEMBERED + 50):
        fail(quarantine, 1, 0.0, f"v{number}")
    assert len(quarantine._records) == REMEMBERED


@given(
    events=st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=60),
    most=st.integers(1, 5),
)
def test_quarantined_exactly_when_so_many_failed_in_a_row(
    events: list[tuple[str, bool]], most: int
) -> None:
    quarantine = Quarantine(most, 1e6)
    row: dict[str, int] = {}
    out: set[str] = set()
    for version, fine in events:
        if version in out:
            continue
        if fine:
            quarantine.succeeded(version)
            row[version] = 0
        else:
            quarantine.failed(version, "broke", 0.0)
            row[version] = row.get(version, 0) + 1
            if row[version] == most:
                out.add(version)
        assert set(quarantine.entries(0.0)) == out
