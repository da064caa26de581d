"""The simulated cluster: answers worked out by hand, laws that always hold, one seed one table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.cluster_sim.arrivals import Call, Demand, Draws, version_name
from loadtests.cluster_sim.clock import SimulatedClock
from loadtests.cluster_sim.costs import PRESETS, EngineCosts
from loadtests.cluster_sim.policies import POLICIES
from loadtests.cluster_sim.replicas import Room, SimulatedReplica
from loadtests.cluster_sim.simulation import Plan, simulate
from loadtests.cluster_sim.tables import compare, faults_of, markdown
from server.cluster.routing import ReplicaLoad

ROOT = Path(__file__).parents[2]
COSTS = EngineCosts(
    fixed_s=1.0, row_s=0.1, adapter_s=0.01, adapter_bytes=7, read_s=3.0, copy_s=0.5, stall_s=0.25
)
SMALL = Plan(
    replicas=3,
    costs=replace(PRESETS["1.2B"], read_s=0.1),
    room=Room(slots=8, host=16),
    demand=Demand(requests=600, adapters=60, tokens=8),
)


class Alone:
    """One replica, and when each of its calls ended."""

    def __init__(self, room: Room) -> None:
        self.clock = SimulatedClock()
        self.ends: dict[int, float] = {}
        self.replica = SimulatedReplica("r", self.clock, COSTS, room, self._answered)
        self._calls = 0

    def ask(self, at_s: float, version: str, tokens: int) -> None:
        call = Call(self._calls, version, tokens)
        self._calls += 1
        self.clock.after(at_s, lambda: self._take(call))

    def run(self) -> None:
        self.clock.run(lambda: True)

    def _take(self, call: Call) -> None:
        self.replica.take(call)

    def _answered(self, _: SimulatedReplica, call: Call) -> None:
        self.ends[call.number] = self.clock.now_s


def test_one_call_takes_its_load_and_its_steps() -> None:
    alone = Alone(Room())
    alone.ask(0.0, "a", 3)
    alone.run()
    # Read 3, copied 0.5; three steps of 1.11, the first held up by 0.25.
    assert alone.ends == {0: pytest.approx(3.5 + 0.25 + 3 * 1.11)}


def test_a_call_joins_the_batch_at_the_next_step_and_lengthens_it() -> None:
    alone = Alone(Room())
    alone.replica.fill(["a", "b"])
    alone.ask(0.0, "a", 3)
    alone.ask(0.5, "b", 1)
    alone.run()
    # Steps: a alone 1.11; a and b 1 + 2 * 0.1 + 2 * 0.01 = 1.22; a alone 1.11.
    assert alone.ends == {1: pytest.approx(2.33), 0: pytest.approx(3.44)}


def test_rows_of_one_adapter_pay_for_it_once() -> None:
    alone = Alone(Room())
    alone.replica.fill(["a"])
    alone.ask(0.0, "a", 1)
    alone.ask(0.1, "a", 1)
    alone.ask(0.1, "a", 1)
    alone.run()
    assert alone.ends[2] == pytest.approx(1.11 + 1.21)


def test_a_full_batch_makes_others_wait() -> None:
    alone = Alone(Room(rows=1))
    alone.replica.fill(["a"])
    alone.ask(0.0, "a", 2)
    alone.ask(0.0, "a", 1)
    alone.run()
    assert alone.ends == {0: pytest.approx(2.22), 1: pytest.approx(3.33)}
    assert alone.replica.most_rows == 1


@pytest.mark.parametrize(("host", "reads"), [(1, 2), (0, 3)])
def test_what_left_its_slot_is_read_again_only_where_memory_has_no_room(
    host: int, reads: int
) -> None:
    alone = Alone(Room(slots=1, host=host))
    for number, version in enumerate("aba"):
        alone.ask(100.0 * number, version, 1)
    alone.run()
    assert alone.replica.counts["reads"] == reads
    assert alone.replica.counts["copies"] == 3
    assert alone.ends[2] == pytest.approx(200 + (0.0 if host else 3.0) + 0.5 + 0.25 + 1.11)


def test_an_adapter_waits_for_a_slot_that_is_in_use() -> None:
    alone = Alone(Room(slots=1))
    alone.replica.fill(["a"])
    alone.ask(0.0, "a", 10)
    alone.ask(0.0, "b", 1)
    alone.run()
    assert alone.ends == {0: pytest.approx(11.1), 1: pytest.approx(11.1 + 0.5 + 0.25 + 1.11)}
    assert list(alone.replica.resident) == ["b"]


def test_few_adapters_are_read_at_once_and_one_is_copied() -> None:
    alone = Alone(Room(reads=1))
    for version in "ab":
        alone.ask(0.0, version, 1)
    alone.run()
    # b is read from 3 to 6 and copied until 6.5, when a has long gone.
    assert alone.ends == {0: pytest.approx(4.86), 1: pytest.approx(6.5 + 0.25 + 1.11)}


def test_a_client_asks_again_when_it_is_answered() -> None:
    plan = Plan(
        replicas=1,
        costs=COSTS,
        room=Room(),
        demand=Demand(requests=4, adapters=1, tokens=1),
        clients=1,
        resident=True,
        warm_share=0.0,
    )
    found = simulate(plan, POLICIES["affinity"])
    assert found.seconds == pytest.approx(4 * 1.11)
    assert (found.counted, found.hits, found.tokens) == (4, 4, 3)  # the last ends after the window
    assert found.tokens_per_s == pytest.approx(1 / 1.11)


def test_presets_give_back_the_steps_that_were_measured() -> None:
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    for rows, adapters, line in (
        (16, 16, "| 16 sequences on 16 adapters | 30.9 | 79.1 |"),
        (64, 16, "| 64 sequences on 16 adapters | 32.9 | 88.8 |"),
        (16, 0, "| 16 sequences on the bare base, same engine | 25.1 | 49.3 |"),
    ):
        assert line in measured
        figures = [float(cell) for cell in line.split("|")[2:4]]
        steps = [1e3 * costs.step_s(rows, adapters) for costs in PRESETS.values()]
        assert steps == pytest.approx(figures)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rate = draw(st.none() | st.floats(1.0, 400.0))
    return Plan(
        replicas=draw(st.integers(1, 4)),
        costs=SMALL.costs,
        room=Room(*(draw(st.integers(low, 6)) for low in (1, 0, 1, 1))),
        demand=Demand(
            requests=draw(st.integers(1, 120)),
            adapters=draw(st.integers(1, 30)),
            zipf=draw(st.sampled_from([0.8, 1.0, 1.2])),
            tokens=draw(st.sampled_from([1, 4])),
            burst_every_s=draw(st.sampled_from([0.0, 2.0])),
            burst_s=0.5,
            seed=draw(st.integers(0, 99)),
        ),
        rate=rate,
        clients=draw(st.integers(1, 40)),
        routers=draw(st.integers(1, 3)),
        warm_share=draw(st.sampled_from([0.0, 0.5])),
        lost_at_s=draw(st.none() | st.floats(0.0, 3.0)),
        restart_s=draw(st.sampled_from([0.2, 2.0])),
    )


@settings(max_examples=80, deadline=None)
@given(plans(), st.sampled_from(list(POLICIES)))
def test_every_arrival_ends_once_and_nothing_holds_more_than_it_has_room_for(
    plan: Plan, policy: str
) -> None:
    found = simulate(plan, POLICIES[policy])
    assert found.arrived == plan.demand.requests
    assert found.answered + found.lost == found.arrived
    assert found.lost == 0 or plan.lost_at_s is not None
    assert 0 <= found.most_slots <= plan.room.slots
    assert 0 <= found.most_rows <= plan.room.rows
    assert found.hits <= found.counted <= found.arrived
    assert found.reads <= found.all_reads
    assert len(found.waits_s) <= found.answered
    assert min(found.waits_s, default=0.0) >= 0.0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_death_of_a_replica_loses_generations_and_nothing_of_one_token(policy: str) -> None:
    plan = replace(SMALL, rate=60.0, lost_at_s=3.0)
    generations = simulate(plan, POLICIES[policy])
    assert generations.lost > generations.again  # a few of them are of one token, too
    one_forward = replace(plan, demand=replace(plan.demand, tokens=1), rate=400.0, lost_at_s=0.5)
    found = simulate(one_forward, POLICIES[policy])
    assert found.lost == 0
    assert found.again > 0


def test_one_seed_gives_one_table_whatever_the_order_of_sets() -> None:
    tables = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "loadtests.cluster_sim", "--replicas=3", "--seed=5"]
        command += ["--adapters=60", "--slots=8", "--host=8", "--requests=800"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        tables.append(done.stdout)
    assert tables[0] == tables[1]
    assert all(f"| {name} |" in tables[0] for name in POLICIES)
    other = replace(SMALL, demand=replace(SMALL.demand, seed=6))
    assert markdown(compare(SMALL)) == markdown(compare(SMALL)) != markdown(compare(other))


def test_affinity_loads_less_than_the_least_loaded_and_makes_as_much() -> None:
    rows = compare(replace(SMALL, room=Room(slots=8, host=24)))
    by_name = {row.policy: row for row in rows}
    assert by_name["affinity"].reads < 0.5 * by_name["least loaded"].reads
    assert by_name["affinity"].throughput > by_name["least loaded"].throughput


def test_goals_that_are_missed_are_named() -> None:
    rows = [row for row in compare(SMALL) if row.policy in {"affinity", "least loaded"}]
    own, other = rows
    good = [replace(own, throughput=0.9, reads=2.0), replace(other, reads=10.0)]
    assert not faults_of(good)
    slow = [replace(good[0], throughput=0.89), good[1]]
    assert faults_of(slow) == ["throughput 0.89 of linear, below 0.9"]
    loads = [replace(good[0], reads=3.0), good[1]]
    assert faults_of(loads) == ["loads 0.30 of least loaded's, above 0.2"]


def test_arrivals_keep_their_rate_and_crowds_want_one_adapter() -> None:
    demand = Demand(
        requests=20_000, adapters=1000, tokens=4, burst_every_s=20.0, burst_s=5.0, burst_factor=4.0
    )
    timed = list(Draws(demand).arrivals(100.0))
    assert timed[-1][0] == pytest.approx(200.0, rel=0.05)
    inside = [call for at, call in timed if 40.0 <= at < 45.0]
    outside = [call for at, call in timed if 45.0 <= at < 60.0]
    assert len(inside) / 5 == pytest.approx(4 * len(outside) / 15, rel=0.15)
    favourite, count = Counter(call.version for call in inside).most_common(1)[0]
    assert count / len(inside) == pytest.approx(0.75, abs=0.05)
    assert sum(call.version == favourite for call in outside) < 0.2 * len(outside)


def test_popularity_is_zipfs_and_lengths_have_their_mean() -> None:
    draws = Draws(Demand(requests=1, adapters=4, zipf=1.0, tokens=64))
    calls = [draws.call() for _ in range(20_000)]
    shares = Counter(call.version for call in calls)
    whole = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for rank in range(1, 5):
        share = shares[version_name(rank - 1)] / len(calls)
        assert share == pytest.approx(1 / rank / whole, rel=0.05)
    assert sum(call.tokens for call in calls) / len(calls) == pytest.approx(64, rel=0.05)


def test_others_choose_as_their_names_say() -> None:
    loads = [ReplicaLoad("a", 3, ()), ReplicaLoad("b", 0, ()), ReplicaLoad("c", 3, ())]
    assert POLICIES["least loaded"](1)("v", loads) == "b"
    turns = POLICIES["round robin"](1)
    assert [turns("v", loads) for _ in range(4)] == ["a", "b", "c", "a"]
    bounded, ring = POLICIES["hashed, bounded"](1), POLICIES["hashed"](1)
    homes = Counter(ring(str(number), loads) for number in range(300))
    assert min(homes.values()) > 30
    # Seven requests with this one: three a replica at most, so only b has room.
    assert {bounded(str(number), loads) for number in range(30)} == {"b"}
