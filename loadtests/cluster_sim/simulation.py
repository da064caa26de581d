"""A cluster from the first request to the last.

Routers know what Ray Serve's know: how many requests a replica had when it took the last one from
this router, one more for each that was sent since and one less for each that ended, and which
adapters were on its device when it last said so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from loadtests.cluster_sim.arrivals import Call, Demand, Draws, version_name
from loadtests.cluster_sim.clock import SimulatedClock
from loadtests.cluster_sim.costs import EngineCosts
from loadtests.cluster_sim.policies import Choose
from loadtests.cluster_sim.replicas import Room, SimulatedReplica
from server.cluster.routing import ReplicaLoad

RESIDENT_EVERY_S: Final = 0.5  # replicas say so often what they have, as server.cluster has it
RESIDENT_LATE_S: Final = 0.1  # and so late routers hear it
QUEUE_FORGOTTEN_S: Final = 10.0  # Ray Serve forgets a length that is older
ASKED_AT_MOST: Final = 2  # of a request of one token


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated.

    Args:
        replicas: Engine replicas.
        costs: Of each.
        room: Of each.
        demand: Of all clients.
        rate: Requests a second, whatever the answers; None: ``clients`` that each wait for theirs.
        clients: Where ``rate`` is None.
        routers: HTTP replicas, each with knowledge of its own.
        warm_share: Of the requests, at the beginning, whose figures are not counted.
        resident: Whether all adapters are in slots from the beginning.
        lost_at_s: When a replica dies; None: never.
        noticed_s: After which its death is known.
        restart_s: After which another is there for it, with nothing in its slots.
    """

    replicas: int
    costs: EngineCosts
    room: Room
    demand: Demand
    rate: float | None = None
    clients: int = 0
    routers: int = 2
    warm_share: float = 0.5
    resident: bool = False
    lost_at_s: float | None = None
    noticed_s: float = 0.5
    restart_s: float = 30.0


@dataclass(slots=True)
class Outcome:
    """What came of it; ``counted`` figures leave the warm-up out.

    Args:
        arrived: All calls.
        answered: Of them, and the others:
        lost: With their replica, or for want of any.
        again: Calls that were asked of a second replica.
        seconds: From the first call to the last end.
        waits_s: Of counted calls that were answered, from their arrival to their first step: what
            queues and loads took.
        counted_s: Of the time in which counted calls arrived.
        tokens: That ended in that time.
        hits: Counted calls that found their adapter in a slot.
        counted: Calls.
        reads: Counted loads of adapters from the store.
        copies: Counted loads of adapters into slots.
        all_reads: From the beginning.
        read_bytes: Counted.
        step_rows: Mean rows of a step, over all of the time.
        step_adapters: Mean distinct adapters of a step.
        most_slots: In use in any replica at any time.
        most_rows: As many, of a batch.
    """

    arrived: int = 0
    answered: int = 0
    lost: int = 0
    again: int = 0
    seconds: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    counted_s: float = 0.0
    tokens: int = 0
    hits: int = 0
    counted: int = 0
    reads: int = 0
    copies: int = 0
    all_reads: int = 0
    read_bytes: int = 0
    step_rows: float = 0.0
    step_adapters: float = 0.0
    most_slots: int = 0
    most_rows: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Throughput while counted calls arrived."""
        return self.tokens / self.counted_s if self.counted_s else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of counted calls that found their adapter in a slot."""
        return self.hits / max(1, self.counted)

    def wait_s(self, share: float) -> float:
        """A quantile of the counted waits; 0 if there are none."""
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def simulate(plan: Plan, policy: Callable[[int], Choose]) -> Outcome:
    """Run a plan to its end.

    Args:
        plan: See there.
        policy: Makes the choice of one router, from a seed of its own.
    """
    return _Run(plan, policy).outcome()


class _Run:
    def __init__(self, plan: Plan, policy: Callable[[int], Choose]) -> None:
        self._plan = plan
        self._clock = SimulatedClock()
        self._draws = Draws(plan.demand)
        self._policies = [policy(plan.demand.seed + n) for n in range(plan.routers)]
        self._known: list[dict[str, tuple[int, float]]] = [{} for _ in range(plan.routers)]
        self._replicas: dict[str, SimulatedReplica] = {}  # that routers know of
        self._all: list[SimulatedReplica] = []
        self._said: dict[str, frozenset[str]] = {}
        self._made = 0
        self._warm = int(plan.warm_share * plan.demand.requests)
        self._counting_since: float | None = None
        self._before: Counter[str] = Counter()
        self._outcome = Outcome()
        self._timed: Iterator[tuple[float, Call]] = iter(())

    def outcome(self) -> Outcome:
        plan, found = self._plan, self._outcome
        for number in range(plan.replicas):
            self._start_replica(phase=(number + 1) / plan.replicas)
        if plan.resident:
            for one in self._all:
                one.fill([version_name(n) for n in range(plan.demand.adapters)])
                self._said[one.name] = frozenset(one.resident)
        if plan.lost_at_s is not None:
            self._clock.after(plan.lost_at_s, self._lose)
        if plan.rate is None:
            for _ in range(min(plan.clients, plan.demand.requests)):
                self._arrive(self._draws.call())
        else:
            self._timed = self._draws.arrivals(plan.rate)
            self._next_timed()
        self._clock.run(lambda: found.answered + found.lost < plan.demand.requests)
        found.seconds = self._clock.now_s
        total = self._counts()
        found.all_reads = total["reads"]
        found.step_rows = total["rows"] / max(1, total["steps"])
        found.step_adapters = total["adapters"] / max(1, total["steps"])
        found.most_slots = max(one.most_slots for one in self._all)
        found.most_rows = max(one.most_rows for one in self._all)
        return found

    def _counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for one in self._all:
            total.update(one.counts)
        return total

    def _next_timed(self) -> None:
        coming = next(self._timed, None)
        if coming is None:
            return
        at, call = coming

        def act() -> None:
            self._arrive(call)
            self._next_timed()

        self._clock.after(at - self._clock.now_s, act)

    def _arrive(self, call: Call) -> None:
        found = self._outcome
        call.arrived_s = self._clock.now_s
        if call.number == self._warm:
            self._counting_since = self._clock.now_s
            self._before = self._counts()
        found.arrived += 1
        self._send(call)
        if found.arrived == self._plan.demand.requests:
            self._stop_counting()

    def _stop_counting(self) -> None:
        found, since = self._outcome, self._counting_since
        if since is None:
            return
        found.counted_s = self._clock.now_s - since
        now = self._counts()
        found.reads = now["reads"] - self._before["reads"]
        found.copies = now["copies"] - self._before["copies"]
        found.read_bytes = found.reads * self._plan.costs.adapter_bytes
        self._counting_since = None

    def _send(self, call: Call) -> None:
        if not self._replicas:
            self._end(call, answered=False)
            return
        router = call.number % self._plan.routers
        known, now = self._known[router], self._clock.now_s
        loads = []
        for name in self._replicas:
            length, at = known.get(name, (0, now))
            forgotten = now - at > QUEUE_FORGOTTEN_S
            loads.append(ReplicaLoad(name, 0 if forgotten else length, self._said[name]))
        chosen = self._replicas[self._policies[router](call.version, loads)]
        call.asked += 1
        hit = chosen.take(call)
        known[chosen.name] = (len(chosen.held), now)
        if call.number >= self._warm and call.asked == 1:
            self._outcome.counted += 1
            self._outcome.hits += hit

    def _answered(self, replica: SimulatedReplica, call: Call) -> None:
        known = self._known[call.number % self._plan.routers]
        length, _ = known.get(replica.name, (1, 0.0))
        known[replica.name] = (max(0, length - 1), self._clock.now_s)
        self._end(call, answered=True)

    def _end(self, call: Call, *, answered: bool) -> None:
        found = self._outcome
        if answered:
            found.answered += 1
            if self._counting_since is not None:
                found.tokens += call.tokens
            if call.number >= self._warm:
                found.waits_s.append(call.began_s - call.arrived_s)
        else:
            found.lost += 1
        if self._plan.rate is None and found.arrived < self._plan.demand.requests:
            # Not within this call: a client that is told nothing is there would ask for ever.
            self._clock.after(0.0, self._ask_next)

    def _ask_next(self) -> None:
        if self._outcome.arrived < self._plan.demand.requests:
            self._arrive(self._draws.call())

    def _start_replica(self, phase: float = 1.0) -> None:
        self._made += 1
        plan = self._plan
        name = f"replica-{self._made}"
        one = SimulatedReplica(name, self._clock, plan.costs, plan.room, self._answered)
        self._all.append(one)
        self._replicas[name] = one
        self._said[name] = frozenset()

        def say() -> None:
            if one.alive:
                resident = frozenset(one.resident)
                self._clock.after(RESIDENT_LATE_S, lambda: self._said.update({name: resident}))
                self._clock.after(RESIDENT_EVERY_S, say)

        self._clock.after(phase * RESIDENT_EVERY_S, say)

    def _lose(self) -> None:
        name = next(iter(self._replicas))
        replica = self._replicas[name]
        replica.die()

        def notice() -> None:
            del self._replicas[name]
            for call in list(replica.held.values()):
                del replica.held[call.number]
                if call.tokens == 1 and call.asked < ASKED_AT_MOST:
                    self._outcome.again += 1
                    self._send(call)
                else:
                    self._end(call, answered=False)

        self._clock.after(self._plan.noticed_s, notice)
        self._clock.after(self._plan.restart_s, self._start_replica)
