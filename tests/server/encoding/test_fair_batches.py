"""Batches of the encode lane: budgets, fairness, progress. No torch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.encoding.fair_batches import (
    LOOKAHEAD_PARTS,
    LOOKAHEAD_ROWS,
    WASTE_SHARE,
    WASTE_TOKENS,
    AdapterVersion,
    Batch,
    Scheduler,
)

KEYS: tuple[AdapterVersion, ...] = (None, "a", "b", "c")
lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)
requests = st.lists(st.tuples(st.sampled_from(KEYS), lengths), min_size=1, max_size=25)


def all_ready(key: AdapterVersion) -> bool:
    return True


def filled(scheduler: Scheduler, wanted: list[tuple[AdapterVersion, list[int]]]) -> None:
    for number, (key, rows) in enumerate(wanted):
        scheduler.submit(str(number), key, rows)


def batches(scheduler: Scheduler) -> list[Batch]:
    found = []
    while (batch := scheduler.next_batch(all_ready)) is not None:
        found.append(batch)
        assert len(found) < 10_000
    return found


@given(requests, st.integers(1, 600), st.integers(1, 20))
def test_every_row_is_served_once_within_the_limits(
    wanted: list[tuple[AdapterVersion, list[int]]], budget: int, most_rows: int
) -> None:
    scheduler = Scheduler(budget, most_rows)
    filled(scheduler, wanted)
    served: Counter[tuple[str, int]] = Counter()
    for batch in batches(scheduler):
        assert len(batch.rows) <= most_rows
        padded_tokens = len(batch.rows) * batch.longest
        assert padded_tokens <= budget or len(batch.rows) == 1
        assert padded_tokens - batch.tokens <= max(WASTE_TOKENS, WASTE_SHARE * padded_tokens)
        runs = [
            row.key
            for i, row in enumerate(batch.rows)
            if i == 0 or row.key != batch.rows[i - 1].key
        ]
        assert len(runs) == len(set(runs)), "rows of one adapter are neighbours"
        served.update((row.request, row.index) for row in batch.rows)
    assert served == Counter(
        (str(number), index)
        for number, (_, rows) in enumerate(wanted)
        for index in range(len(rows))
    )
    depth = scheduler.depth()
    assert (depth.requests, depth.rows, depth.tokens, depth.adapters) == (0, 0, 0, 0)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_two_adapters_with_rows_that_fit_get_the_same_share(
    long: int, short: int, most_rows: int
) -> None:
    scheduler = Scheduler(600, most_rows)
    for number in range(200):
        scheduler.submit(f"long{number}", "long", [long])
        scheduler.submit(f"short{number}", "short", [short])
    served: Counter[AdapterVersion] = Counter()
    for _ in range(20):
        batch = scheduler.next_batch(all_ready)
        assert batch is not None
        for row in batch.rows:
            served[row.key] += row.tokens
        if len(scheduler.waiting()) < 2:
            return
        assert abs(served["long"] - served["short"]) <= 600


def test_a_flood_on_one_adapter_does_not_delay_another() -> None:
    scheduler = Scheduler(1000, 8)
    for number in range(500):
        scheduler.submit(f"flood{number}", "hot", [50])
    scheduler.submit("one", "cold", [50])
    batch = scheduler.next_batch(all_ready)
    assert batch is not None
    assert "one" in {row.request for row in batch.rows}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_an_odd_length_is_not_starved_by_a_stream_of_others(stream: list[int]) -> None:
    scheduler = Scheduler(400, 4)
    scheduler.submit("odd", "a", [390])
    for number in range(60):
        scheduler.submit(f"s{number}", "b", [stream[number % len(stream)]])
        batch = scheduler.next_batch(all_ready)
        assert batch is not None
        if "odd" in {row.request for row in batch.rows}:
            return
    raise AssertionError("the odd row never ran")


def test_an_adapter_that_is_not_ready_delays_nobody_and_gains_no_claim() -> None:
    scheduler = Scheduler(100, 4)
    for number in range(40):
        scheduler.submit(f"a{number}", "a", [10])
        scheduler.submit(f"b{number}", "b", [10])
    for _ in range(5):
        batch = scheduler.next_batch(lambda key: key == "a")
        assert batch is not None
        assert batch.keys == ("a",)
    counts: Counter[AdapterVersion] = Counter()
    for _ in range(4):
        batch = scheduler.next_batch(all_ready)
        assert batch is not None
        counts.update(row.key for row in batch.rows)
    assert abs(counts["a"] - counts["b"]) <= 4, "no more than one batch apart"
    assert scheduler.next_batch(lambda key: False) is None


def test_an_adapter_that_was_idle_gains_no_credit() -> None:
    scheduler = Scheduler(40, 4)
    for number in range(60):
        scheduler.submit(f"a{number}", "a", [10])
        scheduler.submit(f"b{number}", "b", [10])
    for _ in range(10):
        scheduler.next_batch(all_ready)
    for number in range(60):
        scheduler.submit(f"late{number}", "late", [10])
    counts: Counter[AdapterVersion] = Counter()
    for _ in range(6):
        batch = scheduler.next_batch(all_ready)
        assert batch is not None
        counts.update(row.key for row in batch.rows)
    assert max(counts.values()) - min(counts.values()) <= 4, "no more than one batch apart"


@given(st.integers(1, 40), st.integers(2, 64), st.randoms(use_true_random=False))
def test_of_requests_with_rows_alike_at_most_one_is_begun_and_not_ended(
    rows: int, most_rows: int, rng: random.Random
) -> None:
    """What is begun and not ended is work that is no answer to anybody yet."""
    scheduler = Scheduler(8192, most_rows)
    left = {}
    for number in range(30):
        left[str(number)] = rows
        scheduler.submit(str(number), "a", [rng.randint(12, 20) for _ in range(rows)])
    while (batch := scheduler.next_batch(all_ready)) is not None:
        for row in batch.rows:
            left[row.request] -= 1
        assert sum(0 < one < rows for one in left.values()) <= 1


@pytest.mark.parametrize("adapters", [1, 2, 5])
def test_no_row_runs_before_many_that_are_older(adapters: int) -> None:
    """Of its adapter, that is: so a rare length waits little longer than others."""
    rng = random.Random(adapters)
    scheduler = Scheduler(4096, 16)
    waiting: dict[AdapterVersion, list[str]] = {}
    for number in range(400):
        key = str(rng.randrange(adapters))
        waiting.setdefault(key, []).append(str(number))
        scheduler.submit(str(number), key, [rng.randint(1, 300)])
    while (batch := scheduler.next_batch(all_ready)) is not None:
        open_keys = sum(bool(one) for one in waiting.values())
        ahead = max(LOOKAHEAD_ROWS, LOOKAHEAD_PARTS * (16 // open_keys))
        for row in batch.rows:
            assert waiting[row.key].index(row.request) <= ahead  # beside the one that leads
        for row in batch.rows:
            waiting[row.key].remove(row.request)


def test_rows_of_one_adapter_and_length_run_in_the_order_of_their_arrival() -> None:
    scheduler = Scheduler(100, 3)
    for number in range(10):
        scheduler.submit(str(number), "a", [5])
    order = [row.request for batch in batches(scheduler) for row in batch.rows]
    assert order == [str(number) for number in range(10)]


@given(requests, st.integers(0, 24))
def test_cancel_forgets_exactly_one_request(
    wanted: list[tuple[AdapterVersion, list[int]]], victim: int
) -> None:
    scheduler = Scheduler(300, 8)
    filled(scheduler, wanted)
    known = victim < len(wanted)
    assert scheduler.cancel(str(victim)) == known
    assert not scheduler.cancel(str(victim))
    served = {row.request for batch in batches(scheduler) for row in batch.rows}
    assert served == {str(number) for number in range(len(wanted))} - {str(victim)}


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=20), st.floats(0, 100)
)
def test_expire_returns_what_is_due_and_keeps_the_rest(
    deadlines: list[float | None], now: float
) -> None:
    scheduler = Scheduler(100, 4)
    for number, deadline in enumerate(deadlines):
        scheduler.submit(str(number), "a", [3], deadline)
    due = {
        str(n) for n, deadline in enumerate(deadlines) if deadline is not None and deadline <= now
    }
    assert set(scheduler.expire(now)) == due
    assert scheduler.expire(now) == []
    left = {row.request for batch in batches(scheduler) for row in batch.rows}
    assert left == {str(number) for number in range(len(deadlines))} - due


def test_drop_forgets_one_adapter() -> None:
    scheduler = Scheduler(100, 4)
    scheduler.submit("1", "a", [3, 4])
    scheduler.submit("2", "b", [3])
    scheduler.submit("3", "a", [3])
    assert scheduler.drop("a") == ["1", "3"]
    assert scheduler.waiting() == ("b",)
    assert "1" not in scheduler
    assert "2" in scheduler


@pytest.mark.parametrize("rows", [[], [0], [3, 0]])
def test_a_request_without_tokens_is_an_error(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Scheduler(10, 1).submit("1", None, rows)


def test_it_needs_no_torch() -> None:
    modules = "server.encoding.fair_batches, server.messages"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 64), st.integers(1, 6), st.randoms(use_true_random=False))
def test_requests_end_one_after_the_other_whatever_adapters_they_are_for(
    rows: int, most_rows: int, adapters: int, rng: random.Random
) -> None:
    """So a batch has few adapters, and little is begun that is no answer to anybody yet."""
    scheduler = Scheduler(8192, most_rows)
    left = {}
    for number in range(15):
        left[str(number)] = rows
        lengths = [rng.randint(12, 20) for _ in range(rows)]
        scheduler.submit(str(number), str(number % adapters), lengths)
    parts = 0
    found = batches(scheduler)
    for batch in found:
        parts += len({row.request for row in batch.rows})
        for row in batch.rows:
            left[row.request] -= 1
        assert sum(0 < one < rows for one in left.values()) <= adapters
    assert parts <= len(left) + len(found), "only the last request of a batch is cut"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64))
def test_adapters_with_large_and_small_requests_get_the_same_share(
    large: int, small: int, most_rows: int
) -> None:
    scheduler = Scheduler(8192, most_rows)
    for number in range(600 // large):
        scheduler.submit(f"large{number}", "large", [10] * large)
    for number in range(600 // small):
        scheduler.submit(f"small{number}", "small", [10] * small)
    served: Counter[AdapterVersion] = Counter()
    while len(scheduler.waiting()) == 2:
        batch = scheduler.next_batch(all_ready)
        assert batch is not None
        for row in batch.rows:
            served[row.key] += row.tokens
        if len(scheduler.waiting()) == 2:
            assert abs(served["large"] - served["small"]) <= 10 * max(large, small, most_rows)
