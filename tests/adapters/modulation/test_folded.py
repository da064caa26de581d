from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.modulation.folded import FoldedCache

CPU = torch.device("cpu")
SHAPE = (16, 16)
ONE = 16 * 16 * 4


def cache(count: int, spare: int = 0) -> FoldedCache:
    return FoldedCache(count * ONE + spare, CPU)


def keep(folded: FoldedCache, slot: int, saving_ns: float = 1.0, layer: str = "l") -> bool:
    return folded.reserve(slot, layer, SHAPE, torch.float32, saving_ns) is not None


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "forget", "discard", "forward"]),
        st.integers(1, 5),
        st.sampled_from(["a", "b"]),
        st.integers(1, 40),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(operations, st.integers(0, 6000))
def test_the_budget_holds_to_the_byte(todo: list[tuple[str, int, str, int]], budget: int) -> None:
    folded = FoldedCache(budget, CPU)
    held: dict[tuple[int, str], torch.Tensor] = {}
    for what, slot, layer, size in todo:
        if what == "reserve":
            weight = folded.reserve(slot, layer, (size, 8), torch.float32, float(size))
            assert (weight is None) == (size * 8 * 4 > budget)
            if weight is not None:
                held[slot, layer] = weight
        elif what == "forget":
            folded.forget(slot)
        elif what == "discard":
            folded.discard(slot, layer)
        else:
            folded.count_forward([slot])
        held = {key: weight for key, weight in held.items() if folded.has(*key)}
        assert len(folded) == len(held)
        assert folded.nbytes == sum(weight.untyped_storage().nbytes() for weight in held.values())
        assert folded.nbytes <= budget


def test_the_least_valuable_goes_first() -> None:
    folded = cache(2)
    folded.count_forward([1, 2, 3])
    assert keep(folded, 1, 5.0)
    assert keep(folded, 2, 1.0)
    assert keep(folded, 3, 3.0)
    assert folded.has(1, "l")
    assert not folded.has(2, "l")


def test_use_of_late_counts_as_much_as_the_saving() -> None:
    folded = cache(2)
    for _ in range(10):
        folded.count_forward([2])
    folded.count_forward([1, 2, 3])
    assert keep(folded, 1, 5.0)  # once 5
    assert keep(folded, 2, 1.0)  # eleven times 1
    assert keep(folded, 3, 1.0)
    assert not folded.has(1, "l")


def test_use_of_long_ago_fades() -> None:
    folded = cache(1)
    for _ in range(20):
        folded.count_forward([1])
    assert keep(folded, 1)
    for _ in range(20):
        folded.count_forward([2])
    assert not folded.is_worth(2, ONE, 1.0, 1.0)  # as much used: close rivals do not take turns
    for _ in range(400):
        folded.count_forward([2])
    assert folded.is_worth(2, ONE, 1.0, 1.0)


def test_a_weight_is_made_once_its_making_would_have_paid() -> None:
    folded = cache(4)
    for uses in range(1, 12):
        folded.count_forward([1])
        assert folded.is_worth(1, ONE, 10.0, 100.0) == (uses >= 11)  # ten, and what has faded


@pytest.mark.parametrize("saving", [0.0, -3.0])
def test_what_saves_nothing_is_not_worth_its_bytes(saving: float) -> None:
    folded = cache(4)
    for _ in range(50):
        folded.count_forward([1])
    assert not folded.is_worth(1, ONE, saving, 1.0)


def test_few_are_made_in_one_forward_and_the_others_in_the_next() -> None:
    folded = cache(100)
    for _ in range(50):
        folded.count_forward(range(1, 31))
    made = 0
    for slot in range(1, 31):
        if folded.is_worth(slot, ONE, 10.0, 1.0):
            keep(folded, slot)
            made += 1
    assert 0 < made < 30
    before = folded.version
    folded.count_forward([])
    assert folded.version != before  # what was prepared is looked at again
    assert folded.is_worth(30, ONE, 10.0, 1.0)


def test_versions_change_with_what_is_kept_and_are_never_those_of_another() -> None:
    folded, other = cache(2), cache(2)
    seen = {folded.version, other.version}
    for change in (
        lambda: keep(folded, 1),
        lambda: keep(other, 1),
        lambda: folded.forget(1),
        lambda: folded.forget(9),  # holds nothing, but its factors may be others now
        lambda: other.discard(1, "l"),
    ):
        change()
        latest = {folded.version, other.version}
        assert len(latest) == 2
        assert latest - seen
        seen |= latest


def test_a_weight_of_another_dtype_is_not_found() -> None:
    folded = cache(2)
    keep(folded, 1)
    assert folded.has(1, "l", torch.float32)
    assert not folded.has(1, "l", torch.bfloat16)
