"""What is simulated side by side, and the tables that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from loadtests.cluster_sim.policies import POLICIES, Choose, least_loaded
from loadtests.cluster_sim.simulation import Outcome, Plan, simulate

CLIENTS: Final = 96  # of each replica, where the question is how much it can do: 1.5 batches
LOAD: Final = 0.7  # of what the cluster can do, where the question is how long one waits
SATURATED_SHARE: Final = 0.25  # of the requests: throughput needs fewer than loads
ROUNDS: Final = 6  # of each client at least
MIN_THROUGHPUT: Final = 0.9  # of linear
MAX_LOADS: Final = 0.2  # of what least loaded reads


@dataclass(frozen=True, slots=True)
class TableRow:
    """One way to choose, in one cluster.

    Args:
        policy: Its name.
        throughput: Tokens a second with clients that never pause, of what so many replicas would
            make that have all adapters in slots from the beginning.
        wait_p50_s: From arrival to the first step, at ``LOAD`` of that.
        wait_p99_s: As well.
        hit_rate: Share of requests that found their adapter in a slot, there.
        reads: Adapters read from the store for each 1,000 requests, there, after the warm-up.
        all_reads: All of them, from empty replicas on.
        copies: Adapters that came into slots for each 1,000 requests, after the warm-up.
        read_gb: Bytes of ``reads``, in 1e9, for each 1,000 requests.
        lost: Requests that ended without an answer.
    """

    policy: str
    throughput: float
    wait_p50_s: float
    wait_p99_s: float
    hit_rate: float
    reads: float
    all_reads: int
    copies: float
    read_gb: float
    lost: int


def linear_tokens_per_s(plan: Plan) -> float:
    """What ``plan.replicas`` replicas make that never load: as many times what one makes alone."""
    demand = replace(plan.demand, requests=max(2000, plan.demand.requests // 50), burst_every_s=0.0)
    alone = replace(
        plan,
        replicas=1,
        room=replace(plan.room, slots=demand.adapters),
        demand=demand,
        rate=None,
        clients=CLIENTS,
        resident=True,
        lost_at_s=None,
    )
    return plan.replicas * simulate(alone, least_loaded).tokens_per_s


def compare(
    plan: Plan, policies: Mapping[str, Callable[[int], Choose]] | None = None, load: float = LOAD
) -> list[TableRow]:
    """Simulate a plan with each policy: once with clients that never pause, once at ``load``."""
    linear = linear_tokens_per_s(plan)
    found = []
    for name, policy in (policies or POLICIES).items():
        clients = CLIENTS * plan.replicas
        fewer = max(ROUNDS * clients, int(plan.demand.requests * SATURATED_SHARE))
        saturated = replace(
            plan,
            rate=None,
            clients=clients,
            demand=replace(plan.demand, requests=fewer, burst_every_s=0.0),
            lost_at_s=None,
        )
        calm = replace(plan, rate=load * linear / plan.demand.tokens)
        found.append(_row(name, simulate(saturated, policy), simulate(calm, policy), linear))
    return found


def faults_of(rows: Iterable[TableRow]) -> list[str]:
    """Which goals the product's routing misses."""
    by_name = {row.policy: row for row in rows}
    own, other = by_name["affinity"], by_name["least loaded"]
    faults = []
    if own.throughput < MIN_THROUGHPUT:
        faults.append(f"throughput {own.throughput:.2f} of linear, below {MIN_THROUGHPUT}")
    if own.reads > MAX_LOADS * other.reads:
        share = own.reads / other.reads if other.reads else float("inf")
        faults.append(f"loads {share:.2f} of least loaded's, above {MAX_LOADS}")
    return faults


def markdown(rows: Iterable[TableRow]) -> str:
    """The rows as a table."""
    lines = [
        "| routing | throughput of linear | wait p50, p99 (s) | found in a slot | loads from the"
        " store | into slots | GB read | lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.policy} | {row.throughput:.2f} | {row.wait_p50_s:.2f}, {row.wait_p99_s:.2f} "
        f"| {row.hit_rate:.3f} | {row.reads:.1f} | {row.copies:.0f} | {row.read_gb:.2f} "
        f"| {row.lost} |"
        for row in rows
    ]
    return "\n".join(lines)


def _row(name: str, saturated: Outcome, calm: Outcome, linear: float) -> TableRow:
    thousands = max(1, calm.counted) / 1e3
    return TableRow(
        policy=name,
        throughput=saturated.tokens_per_s / linear,
        wait_p50_s=calm.wait_s(0.5),
        wait_p99_s=calm.wait_s(0.99),
        hit_rate=calm.hit_rate,
        reads=calm.reads / thousands,
        all_reads=calm.all_reads,
        copies=calm.copies / thousands,
        read_gb=calm.read_bytes / 1e9 / thousands,
        lost=calm.lost,
    )
