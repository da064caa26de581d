"""Affinity with spill-over, as a function: no Ray, no clock."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.routing import ReplicaLoad, SpillPolicy, route


def idle(count: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(f"r{number}", 0, ()) for number in range(count)]


@st.composite
def clusters(draw: st.DrawFn) -> list[ReplicaLoad]:
    count = draw(st.integers(1, 8))
    versions = st.sets(st.sampled_from("abcdef"))
    return [
        ReplicaLoad(f"r{number}", draw(st.integers(0, 100)), frozenset(draw(versions)))
        for number in range(count)
    ]


@given(clusters(), st.sampled_from([None, *"abcdef"]))
def test_every_replica_is_named_once_whatever_the_load(
    replicas: list[ReplicaLoad], version: str | None
) -> None:
    found = route(version, replicas)
    assert sorted(found.order) == sorted(one.name for one in replicas)


@given(clusters(), st.sampled_from("abcdef"))
def test_order_of_the_list_and_so_of_the_router_changes_nothing(
    replicas: list[ReplicaLoad], version: str
) -> None:
    assert route(version, replicas) == route(version, replicas[::-1])


@given(clusters(), st.sampled_from("abcdef"))
def test_a_busy_replica_is_chosen_only_where_all_are_busy(
    replicas: list[ReplicaLoad], version: str
) -> None:
    bound = SpillPolicy().bound(replicas)
    loads = {one.name: one.queued for one in replicas}
    chosen = loads[route(version, replicas).order[0]]
    assert chosen < bound or all(one >= bound for one in loads.values())


@given(clusters(), st.sampled_from("abcdef"))
def test_a_replica_without_the_adapter_is_chosen_only_where_none_with_it_is_free(
    replicas: list[ReplicaLoad], version: str
) -> None:
    bound = SpillPolicy().bound(replicas)
    found = route(version, replicas)
    has = {one.name: version in one.resident for one in replicas}
    if not has[found.order[0]]:
        assert not any(version in one.resident and one.queued < bound for one in replicas)
    assert (found.reason == "resident") == has[found.order[0]]


def test_an_adapter_that_is_nowhere_goes_to_the_same_place_every_time() -> None:
    homes = {version: route(version, idle(4)).order[0] for version in map(str, range(400))}
    assert all(route(one, idle(4)).order[0] == home for one, home in homes.items())
    shares = Counter(homes.values())
    assert min(shares.values()) > 60, shares


def test_a_replica_more_moves_only_what_it_takes() -> None:
    moved = {
        after
        for version in map(str, range(200))
        if (after := route(version, idle(5)).order[0]) != route(version, idle(4)).order[0]
    }
    assert moved == {"r4"}


def test_a_popular_adapter_spreads_and_comes_back_together() -> None:
    replicas = {one.name: one for one in idle(4)}
    for _ in range(64):
        name = route("hot", list(replicas.values())).order[0]
        replicas[name] = ReplicaLoad(name, replicas[name].queued + 1, {"hot"})
    assert max(one.queued for one in replicas.values()) <= 1.25 * 16 + 1
    assert all(one.resident for one in replicas.values())
    calm = [ReplicaLoad(one.name, 0, one.resident) for one in replicas.values()]
    assert {route("hot", calm).order[0] for _ in range(8)} == {route("hot", idle(4)).order[0]}


def test_a_cold_adapter_stays_in_one_replica_beside_a_hot_one() -> None:
    home = route("cold", idle(3)).order[0]
    replicas = [ReplicaLoad(one.name, 7, {"cold"} if one.name == home else ()) for one in idle(3)]
    found = route("cold", replicas)
    assert (found.order[0], found.reason) == (home, "resident")


def test_the_bare_base_goes_to_the_least_loaded() -> None:
    replicas = [ReplicaLoad("a", 3, ()), ReplicaLoad("b", 1, ()), ReplicaLoad("c", 2, ())]
    found = route(None, replicas)
    assert (found.order, found.reason) == (("b", "c", "a"), "base")


def test_reasons_tell_a_first_place_from_a_spill() -> None:
    home, second = route("v", idle(2)).order[0], route("v", idle(2)).order[1]
    assert route("v", idle(2)).reason == "placed"
    busy = [ReplicaLoad(home, 50, {"v"}), ReplicaLoad(second, 0, ())]
    assert (route("v", busy).order[0], route("v", busy).reason) == (second, "spilled")


def test_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError, match="no replica"):
        route("v", [])
