"""Admission: bounds overall and per adapter, and times to return that spread a crowd."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.admit import admission as module
from server.edge.admit.admission import RETRY_MAX_S, Admission
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.errors import Refusal
from server.messages import EncodeRequest, ProcessedImage, TokenizedInput


def request(adapter: str | None = None, tokens: int = 3) -> EncodeRequest:
    inputs = (TokenizedInput(tuple(range(tokens))),)
    return EncodeRequest("", "text-classification", adapter, adapter, inputs)


def admit(admission: Admission, one: EncodeRequest) -> None:
    admission.check(one.adapter, one.tokens, one.pixel_bytes)
    admission.add(one)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def wide(**bounds: int) -> Admission:
    given_bounds = {"requests": 5000, "tokens": 1 << 20, "adapter_requests": 5000, **bounds}
    return Admission(SharedLoad(1), Bounds(**given_bounds), 1)


def test_tokens_of_one_adapter_are_bounded() -> None:
    admission = wide(adapter_tokens=10)
    admit(admission, request("hot", 6))
    with pytest.raises(Refusal, match="overloaded") as caught:
        admit(admission, request("hot", 6))
    assert caught.value.faults[0].found == "6 tokens for this adapter, and 6 more asked for"
    admit(admission, request("cold", 6))
    admit(admission, request("hot", 4))
    with pytest.raises(Refusal, match="overloaded"):
        admission.check_early("hot")
    admission.check_early("cold")
    admission.check_early(None)


def images(count: int, adapter: str | None = None) -> EncodeRequest:
    inputs = (ProcessedImage(bytes(48), (3, 2, 2), 5),) * count
    return EncodeRequest("", "image-classification", adapter, adapter, inputs)


def test_pixels_are_bounded_over_all_adapters_and_processes() -> None:
    load = SharedLoad(2)
    bounds = Bounds(100, 10_000, 100, pixel_bytes=48 * 5)
    one, other = Admission(load, bounds, 2), Admission(load, bounds, 2)
    other.number = 1
    first, second = images(3, "a"), images(2, "b")
    admit(one, first)
    admit(other, second)
    for admission in (one, other):
        with pytest.raises(Refusal, match="overloaded") as caught:
            admit(admission, images(1, "c"))
        assert caught.value.faults[0].found == "240 bytes of pixels, and 48 more asked for"
        admit(admission, request("text"))  # has none
    one.remove(first)
    admit(other, images(3, "c"))
    with pytest.raises(Refusal, match="overloaded"):
        admit(one, images(9))
    other.remove(images(3, "c"))
    other.remove(second)
    assert load.pixel_bytes() == 0
    admit(one, images(9))  # more than ever fits, but alone


def test_request_larger_than_its_adapters_tokens_runs_alone() -> None:
    admission = wide(adapter_tokens=10)
    admit(admission, request("hot", 50))
    with pytest.raises(Refusal, match="overloaded"):
        admit(admission, request("hot", 1))
    admission.remove(request("hot", 50))
    admit(admission, request("hot", 1))


@given(
    bounds=st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 5), st.integers(1, 40)),
    asked=st.lists(
        st.tuples(st.sampled_from([None, "a", "b"]), st.integers(1, 20), st.booleans()),
        max_size=60,
    ),
)
def test_every_bound_is_kept_whatever_comes_and_goes(
    bounds: tuple[int, int, int, int], asked: list[tuple[str | None, int, bool]]
) -> None:
    load = SharedLoad(1)
    admission = Admission(load, Bounds(*bounds), 1)
    running: list[EncodeRequest] = []
    for adapter, tokens, leaves in asked:
        if leaves and running:
            admission.remove(running.pop(0))
        one = request(adapter, tokens)
        with suppress(Refusal):
            admission.check_early(adapter)
            admission.check(adapter, tokens)
            admission.add(one)
            running.append(one)
        assert load.requests() == len(running) <= bounds[0]
        assert load.tokens() == sum(each.tokens for each in running)
        assert load.tokens() <= bounds[1] or len(running) == 1
        for name in (None, "a", "b"):
            mine = [each.tokens for each in running if each.adapter == name]
            assert len(mine) <= bounds[2]
            assert sum(mine) <= bounds[3] or len(mine) == 1


def test_early_check_refuses_nothing_that_would_be_admitted() -> None:
    admission = wide(requests=2)
    admit(admission, request("a"))
    admission.check_early("a")
    admit(admission, request("a"))
    with pytest.raises(Refusal, match="overloaded"):
        admission.check_early(None)


def spread(waits: list[int]) -> float:
    """The share of the crowd that comes back in the fullest second."""
    return max(Counter(waits).values()) / len(waits)


def test_time_to_return_follows_the_rate_at_which_requests_end(clock: Clock) -> None:
    time = clock
    admission = wide()
    for _ in range(400):  # 100 a second
        one = request()
        admit(admission, one)
        time.now += 0.01
        admission.remove(one)
    for _ in range(200):
        admit(admission, request())
    waits = [admission.retry_after_s() for _ in range(1000)]
    # 200 run and up to 1000 come back, at 100 a second: 3 s for the first, 12 s for the last.
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (3, 12)
    assert spread(waits) < 0.12


def test_crowd_at_a_server_that_has_answered_nothing_yet_is_spread_too() -> None:
    admission = wide()
    for _ in range(1000):
        admit(admission, request())
    waits = [admission.retry_after_s() for _ in range(3000)]
    assert min(waits) >= 10
    assert spread(waits) < 0.1


def test_crowd_beyond_the_longest_time_is_spread_over_its_later_half(
    clock: Clock,
) -> None:
    time = clock
    admission = wide()
    for _ in range(10):
        one = request()
        admit(admission, one)
        time.now += 0.5
        admission.remove(one)
    waits = [admission.retry_after_s() for _ in range(4000)][1000:]
    assert min(waits) >= RETRY_MAX_S // 2
    assert max(waits) == RETRY_MAX_S
    assert spread(waits) < 0.1


def test_in_a_queue_no_adapter_has_much_more_than_its_part() -> None:
    admission = wide(requests=100)
    for _ in range(60):  # alone it may have nearly all
        admit(admission, request("hot"))
    for name in ("b", "c", "d"):
        admit(admission, request(name))
    with pytest.raises(Refusal, match="overloaded") as caught:
        admit(admission, request("hot"))
    assert caught.value.faults[0].expected == "at most 38"  # 1.5 of a quarter of 100
    for _ in range(20):
        admit(admission, request("b"))
    for _ in range(25):
        admission.remove(request("hot"))
    admit(admission, request("hot"))


def test_nobody_is_held_to_a_part_before_half_of_the_queue_is_there() -> None:
    admission = wide(requests=100)
    for name in ("b", "c", "d"):
        admit(admission, request(name))
    for _ in range(47):
        admit(admission, request("hot"))
    with pytest.raises(Refusal, match="overloaded"):
        admit(admission, request("hot"))
