"""The books of residency: what is kept up with every change is what a look at all entries gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.factors import Factors
from adapters.layers.inject import AdaptedModel, inject
from adapters.residency.packing import PackedAdapter, pack_adapter
from adapters.residency.tiers import Tiers
from tests.stand.residencies import WIDTH, weights_of

CPU = torch.device("cpu")
NAMES = tuple("abcdefgh")
ONE = 2 * 2 * WIDTH * 4


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return inject(nn.Sequential(nn.Linear(WIDTH, WIDTH)))


def packed(name: str, adapted: AdaptedModel) -> PackedAdapter:
    """Of three sizes; every second one is pruned."""
    number = NAMES.index(name)
    weights: Any = weights_of(name, adapted, rank=1 + number % 3)
    if number % 2:
        factors = {
            path: Factors(one.method, torch.zeros_like(one.a), one.b)
            for path, one in weights.factors.items()
        }
        weights = replace(weights, factors=factors, sparsity=0.5)
    return pack_adapter(weights, torch.float32, CPU)


def check(tiers: Tiers) -> None:
    entries = tiers.entries
    in_slots = [one for one, entry in entries.items() if entry.slot is not None]
    assert sorted(tiers.holding) == sorted(in_slots)
    ready = [one for one in in_slots if entries[one].state == "ready"]
    assert [one for one in tiers.holding if one in ready] == ready, "in another order"
    assert tiers.device_used() == sum(
        one.packed.nbytes for one in entries.values() if one.slot is not None and one.packed
    )
    assert tiers.host_used() == sum(
        one.packed.host_nbytes(in_slot=one.slot is not None)
        for one in entries.values()
        if one.packed
    )
    assert len(tiers.free) + len(in_slots) == tiers.slots
    loose = {
        one
        for one, entry in entries.items()
        if entry.slot is None and one not in tiers.wanted and entry.packed and entry.packed.is_loose
    }
    found = tiers.to_compact()
    assert (found is None) == (not loose)
    assert found is None or (found[0] in loose and found[1] is entries[found[0]].packed)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["want", "want", "read", "read", "place", "place", "use", "forget", "fail", "trim",
             "compact", "lease", "release"]
        ),
        st.sampled_from(NAMES),
    ),
    min_size=10,
    max_size=80,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(acts=ACTS, slots=st.integers(1, 4), host=st.integers(0, 6))
def test_sums_and_orders_are_those_of_all_entries(
    adapted: AdaptedModel, acts: list[tuple[str, str]], slots: int, host: int
) -> None:
    clock = [0.0]
    tiers = Tiers(
        adapted, slots=slots, device_bytes=4 * ONE, host_bytes=host * ONE, clock=lambda: clock[0]
    )
    for act, name in acts:
        clock[0] += 0.3
        entry = tiers.entries.get(name)
        match act:
            case "want":
                tiers.want(name)
            case "read":
                if entry is not None and entry.packed is None and name in tiers.wanted:
                    tiers.take(name, packed(name, adapted))
                    tiers.trim_host()
                elif entry is not None and entry.packed is not None and entry.packed.is_compact:
                    entry.packed.restore()
                    tiers.changed(name)
            case "place":
                leaving, arriving, _ = tiers.divide_slots()
                check(tiers)
                for vacated in leaving:
                    tiers.empty(vacated)
                    tiers.changed(vacated.version)
                for one in arriving:
                    held = tiers.entries[one].packed
                    assert held is not None
                    held.to_device(CPU)
                    tiers.changed(one)
                    tiers.arrive(one, 0.5)
                tiers.trim_host()
            case "use" if entry is not None and entry.state == "ready":
                tiers.use(name)
            case "lease" if entry is not None and entry.state == "ready":
                entry.leases += 1
            case "release" if entry is not None and entry.leases:
                entry.leases -= 1
            case "forget" if entry is not None and not entry.leases:
                tiers.forget(name)
            case "fail":
                tiers.fail(name, OSError("broken"))
            case "trim":
                tiers.trim_host()
            case "compact":
                found = tiers.to_compact()
                if found is not None:
                    found[1].compact()
                    tiers.changed(found[0])
            case _:
                pass
        check(tiers)
