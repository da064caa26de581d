"""One replica on paper: a batch that goes on step by step, slots, host memory and loads.

As the engine does it: whoever asks for an adapter that is not in a slot waits for it and holds up
nobody, few adapters are read from the store at once, one at a time comes into a slot, and the slot
used longest ago that no request needs is given away.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loadtests.cluster_sim.arrivals import Call
from loadtests.cluster_sim.clock import SimulatedClock
from loadtests.cluster_sim.costs import EngineCosts


@dataclass(frozen=True, slots=True)
class Room:
    """What a replica has room for.

    Args:
        slots: Adapters on the device.
        host: Adapters in host memory besides.
        rows: Of a batch.
        reads: Adapters that are read at once.
    """

    slots: int = 256
    host: int = 2048
    rows: int = 64
    reads: int = 3


class SimulatedReplica:
    """See the module.

    Args:
        name: Never that of another.
        clock: Of the simulation.
        costs: Of steps and loads.
        room: What it holds.
        answered: Called with each call that is done.
    """

    def __init__(
        self,
        name: str,
        clock: SimulatedClock,
        costs: EngineCosts,
        room: Room,
        answered: Callable[[SimulatedReplica, Call], None],
    ) -> None:
        self.name = name
        self.costs = costs
        self.room = room
        self.alive = True
        self.held: dict[int, Call] = {}  # what waits or runs here
        self.resident: OrderedDict[str, None] = OrderedDict()  # in slots, oldest use first
        self.counts: Counter[str] = Counter()  # reads, copies, steps, rows, adapters of steps
        self.most_slots = 0
        self.most_rows = 0
        self._clock = clock
        self._answered = answered
        self._host: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, list[Call]] = {}  # for an adapter that comes
        self._to_read: deque[str] = deque()
        self._to_copy: deque[str] = deque()
        self._reading = 0
        self._copying: str | None = None
        self._ready: deque[Call] = deque()
        self._leases: Counter[str] = Counter()  # calls that are ready or run
        self._running: Counter[str] = Counter()  # rows of the batch, by adapter
        self._rows = 0
        self._ends: defaultdict[int, list[Call]] = defaultdict(list)  # by number of the step
        self._step = 0
        self._stepping = False
        self._stalls = 0

    def fill(self, versions: list[str]) -> None:
        """Have adapters in slots from the beginning, at no cost.

        Raises:
            ValueError: There are fewer slots.
        """
        if len(versions) > self.room.slots:
            raise ValueError(f"{len(versions)} adapters do not fit into {self.room.slots} slots")
        self.resident.update(dict.fromkeys(versions))

    def take(self, call: Call) -> bool:
        """Begin with a call; whether its adapter is in a slot."""
        self.held[call.number] = call
        if not self.alive:  # nobody knows yet
            return False
        if call.version in self.resident:
            self._make_ready(call)
            return True
        if call.version not in self._waiting:
            self._waiting[call.version] = []
            in_memory = call.version in self._host
            if in_memory:
                del self._host[call.version]
            (self._to_copy if in_memory else self._to_read).append(call.version)
        self._waiting[call.version].append(call)
        self._load()
        return False

    def die(self) -> None:
        """Nothing is done from now on; what is held stays held until somebody notices."""
        self.alive = False

    def _load(self) -> None:
        while self._to_read and self._reading < self.room.reads:
            self._reading += 1
            self.counts["reads"] += 1
            version = self._to_read.popleft()
            self._clock.after(self.costs.read_s, partial(self._on_read, version))
        if self._copying is None and self._to_copy and self._find_slot():
            self._copying = self._to_copy.popleft()
            self.counts["copies"] += 1
            self._clock.after(self.costs.copy_s, self._on_copied)

    def _on_read(self, version: str) -> None:
        if self.alive:
            self._reading -= 1
            self._to_copy.append(version)
            self._load()

    def _on_copied(self) -> None:
        if not self.alive:
            return
        assert self._copying is not None
        version, self._copying = self._copying, None
        self.resident[version] = None
        self.most_slots = max(self.most_slots, len(self.resident))
        self._stalls += 1
        for call in self._waiting.pop(version):
            self._make_ready(call)
        self._load()

    def _find_slot(self) -> bool:
        if len(self.resident) < self.room.slots:
            return True
        leaves = next((one for one in self.resident if not self._leases[one]), None)
        if leaves is None:
            return False
        del self.resident[leaves]
        self._host[leaves] = None
        while len(self._host) > self.room.host:
            self._host.popitem(last=False)
        return True

    def _make_ready(self, call: Call) -> None:
        self._leases[call.version] += 1
        self.resident.move_to_end(call.version)
        self._ready.append(call)
        if not self._stepping:
            self._begin_step()

    def _begin_step(self) -> None:
        while self._ready and self._rows < self.room.rows:
            call = self._ready.popleft()
            call.began_s = self._clock.now_s
            self._rows += 1
            self._running[call.version] += 1
            self._ends[self._step + call.tokens].append(call)
        self._stepping = self._rows > 0
        if not self._stepping:
            return
        self.most_rows = max(self.most_rows, self._rows)
        self.counts.update(steps=1, rows=self._rows, adapters=len(self._running))
        took = self.costs.step_s(self._rows, len(self._running))
        took += self._stalls * self.costs.stall_s
        self._stalls = 0
        self._clock.after(took, self._on_stepped)

    def _on_stepped(self) -> None:
        if not self.alive:
            return
        self._step += 1
        ended = self._ends.pop(self._step, [])
        for call in ended:
            self._rows -= 1
            for counter in (self._running, self._leases):
                counter[call.version] -= 1
                if not counter[call.version]:
                    del counter[call.version]
            del self.held[call.number]
        # Whoever is told may send the next call at once: the step is not over before they have.
        for call in ended:
            self._answered(self, call)
        if ended:
            self._load()
        self._begin_step()
