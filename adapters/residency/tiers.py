"""The books of residency: what is in which slot and tier, what may leave, and what fits.

Pure bookkeeping over the adapters in memory, without a thread or a lock:
``adapters.residency.slots`` calls it with its lock held.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from adapters.errors import StoreFull
from adapters.layers.inject import AdaptedModel
from adapters.residency.packing import PackedAdapter

State = Literal["absent", "loading", "ready", "failed"]
Tier = Literal["device", "host", "loading", "failed"]

_FAILURES_KEPT = 256
_COLD_LOADS_KEPT = 4096  # whose times nobody has taken yet
# Smaller adapters may be placed before one for which there is no room, for so long; then they wait
# behind it, or a stream of them could keep it waiting for ever.
PASS_S = 10.0
PINNED_QUARTERS = 3  # of the device bytes that pinned versions may take

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """Where adapters are at one moment.

    Args:
        tiers: By version; a version not in it is on disk, or unknown.
        device_bytes: Of factors in slots, in the compute dtype.
        host_bytes: Of factors kept out of slots, and of all heads.
        folded_bytes: Of cached folded weights.
        slots_used, slots: Slots with an adapter, and all of them.
        pinned: Versions that may not leave.
        pins_without_room: Asked to be pinned, but more than pins may take: served as any other.
        loads, evictions, failures: Since the start.
        ready_made: Of the loads, those from packed files.
    """

    tiers: dict[str, Tier]
    device_bytes: int
    host_bytes: int
    folded_bytes: int
    slots_used: int
    slots: int
    pinned: tuple[str, ...]
    pins_without_room: tuple[str, ...]
    loads: int
    evictions: int
    failures: int
    ready_made: int = 0


@dataclass(slots=True)
class Entry:
    """One version that residency knows.

    Args:
        state: What ``Residency.state`` says.
        packed: Its factors and head, when they are in memory.
        slot: Where it is on the device.
        leases: Batches that use it.
        kept_until: Monotonic end of its grace; 0 once it was leased.
        doomed: Dropped while in use; leaves with its last lease.
        error: Why it failed.
        stuck_since: Monotonic, when it was first found to have no room; 0 when it was not.
        cold_since: Monotonic, when it was asked for while on disk only; None when it was not.
        counted: Its bytes of host memory, as the sum of all has them.
    """

    state: State = "loading"
    packed: PackedAdapter | None = None
    slot: int | None = None
    leases: int = 0
    kept_until: float = 0.0  # monotonic; its grace, until first leased
    doomed: bool = False  # dropped while in use
    error: Exception | None = None
    stuck_since: float = 0.0
    cold_since: float | None = None
    counted: int = 0

    @property
    def is_arriving(self) -> bool:
        """Whether the loader is filling its slot: only the loader may empty it then."""
        return self.slot is not None and self.state == "loading"

    @property
    def tier(self) -> Tier:
        """Where it is, for people."""
        if self.state == "ready":
            return "device"
        if self.state in ("loading", "failed"):
            return self.state
        return "host"


class Vacated(NamedTuple):
    """A slot that the books have taken from an adapter, whose factors are still to leave it."""

    slot: int
    packed: PackedAdapter
    version: str


class Tiers:
    """The slots of one device and the host tier behind them.

    What is asked at every load takes as long for ten thousand adapters in memory as for ten: sums
    are kept up, and those in slots stand in an order of their own.

    Args:
        adapted: Whose slots they are; emptied here, filled by the caller.
        slots: How many.
        device_bytes: Budget of factors in slots.
        host_bytes: Budget of factors out of slots and of all heads.
        clock: Seconds that only grow; what graces and waits are counted by.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        *,
        slots: int,
        device_bytes: int,
        host_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self.holding: OrderedDict[str, Entry] = OrderedDict()  # those in slots, in that order too
        self.free = list(range(slots, 0, -1))
        self.pinned: tuple[str, ...] = ()  # as asked for; see divide_pins
        self.wanted: OrderedDict[str, None] = OrderedDict()  # first asked for first
        self.evictions = self.failures = 0
        self.cold_load_s: deque[float] = deque(maxlen=_COLD_LOADS_KEPT)  # oldest first
        self._adapted = adapted
        self._clock = clock
        self._device_used = self._host_used = 0
        self._uncounted: set[str] = set()  # whose host bytes may have changed since they were
        self._loose: dict[str, None] = {}  # pruned, and perhaps whole without a need

    @property
    def most_pins(self) -> int:
        """Slots that pinned versions may take: one is always left to the others."""
        return self.slots - 1

    def divide_pins(self, version: str | None = None, need: int = 0) -> tuple[list[str], list[str]]:
        """Which pinned versions may not leave, and which there is no room to pin.

        Pins take all slots but one and three quarters of the bytes at most, those named first
        before the others, and give way to a ``version`` whose ``need`` bytes could not be had
        otherwise: whatever is pinned, any other adapter can be served.
        """
        held: list[str] = []
        excess: list[str] = []
        left, beside = self.device_bytes * PINNED_QUARTERS // 4, self.device_bytes - need
        for name in self.pinned:
            if len(held) >= self.most_pins:
                excess.append(name)
                continue
            entry = self.entries.get(name)
            if entry is None or entry.state not in ("loading", "ready"):
                continue
            size = 0 if entry.packed is None else entry.packed.nbytes
            if size > left or (name != version and size > beside):
                excess.append(name)
                continue
            held.append(name)
            left -= size
            beside -= 0 if name == version else size
        return held, excess

    def want(self, version: str) -> bool:
        """Put ``version`` in the queue, unless it is ready; whether it was not in it."""
        entry = self.entries.get(version)
        if entry is None:
            entry = self.entries[version] = Entry()
        entry.doomed = False
        if entry.state == "ready" or version in self.wanted:
            return False
        entry.state, entry.error, entry.stuck_since = "loading", None, 0.0
        entry.cold_since = self._clock() if entry.packed is None else None
        self.wanted[version] = None
        return True

    def divide_slots(self) -> tuple[list[Vacated], list[str], list[str]]:
        """Give slots to those that wait, in the order asked; those that find room may pass one
        that does not, until it has waited for PASS_S. Nothing is copied yet.

        Returns:
            What is to be emptied, who is to be put in, and who failed.
        """
        leaving: list[Vacated] = []
        arriving: list[str] = []
        failed: list[str] = []
        for version in list(self.wanted):
            entry = self.entries[version]
            packed = entry.packed
            if packed is None or packed.is_compact:
                continue  # it is still being read; those behind it may go first
            obstacle = self.obstacle(packed.nbytes)
            if obstacle is not None:
                failed += self.fail(version, obstacle)
                continue
            gone = self.make_room(version, packed.nbytes)
            if gone is None:
                now = self._clock()
                entry.stuck_since = entry.stuck_since or now
                if now - entry.stuck_since >= PASS_S:
                    break
                continue
            entry.stuck_since = 0.0
            leaving += gone
            arriving.append(version)
            entry.slot = self.free.pop()
            self.holding[version] = entry
            self._device_used += packed.nbytes
            self.changed(version)
        return leaving, arriving, failed

    def arrive(self, version: str, grace_s: float) -> list[str]:
        """The slot of ``version`` is filled; returns it, unless it was dropped meanwhile."""
        entry = self.entries[version]
        del self.wanted[version]
        entry.state = "ready"
        if entry.cold_since is not None:
            self.cold_load_s.append(self._clock() - entry.cold_since)
        if entry.doomed:
            self.forget(version)
            return []
        entry.kept_until = self._clock() + grace_s
        self._move_to_end(version)
        return [version]

    def take(self, version: str, packed: PackedAdapter) -> None:
        """It was read, and is in host memory from now on."""
        self.entries[version].packed = packed
        self.changed(version)

    def use(self, version: str) -> None:
        """It is used: its grace ends, and it is the last to leave."""
        self.entries[version].kept_until = 0.0
        self._move_to_end(version)

    def changed(self, version: str) -> None:
        """Its bytes of host memory are to be counted anew: call it after whatever changes them."""
        self._uncounted.add(version)

    def _move_to_end(self, version: str) -> None:
        self.entries.move_to_end(version)
        if version in self.holding:
            self.holding.move_to_end(version)

    def _drop(self, version: str) -> Entry:
        """Take an entry out of the books; it may still have a slot."""
        entry = self.entries.pop(version)
        self._host_used -= entry.counted
        self._uncounted.discard(version)
        self._loose.pop(version, None)
        return entry

    def fail(self, version: str, error: Exception) -> list[str]:
        """It cannot be had; returns it, unless nobody waits for it. What it held is let go."""
        entry = self.entries.get(version)
        if entry is None or version not in self.wanted:
            return []
        del self.wanted[version]
        if entry.slot is not None:
            try:
                self._leave_slot(version, entry)
            except Exception:  # it is empty in the books: the next fills it anew
                logger.exception("the slot of %s could not be emptied", version)
        entry.state, entry.error, entry.packed = "failed", error, None
        self.changed(version)
        self.failures += 1
        if entry.doomed:
            self._drop(version)
            return []
        failed = [name for name, other in self.entries.items() if other.state == "failed"]
        for name in failed[:-_FAILURES_KEPT]:
            self._drop(name)
        return [version]

    def forget(self, version: str) -> None:
        """Let go of all of it; its slot is in no batch's use."""
        entry = self._drop(version)
        self.wanted.pop(version, None)
        if entry.slot is not None:
            self._leave_slot(version, entry)

    def obstacle(self, need: int) -> Exception | None:
        """Why ``need`` bytes can never be in a slot, or None."""
        if need <= self.device_bytes:
            return None
        return StoreFull(
            "The adapter is larger than the memory for adapters.",
            found=f"{need} bytes",
            expected=f"at most {self.device_bytes} bytes",
            fix="Allow more memory for adapters on the device, or use a smaller rank.",
        )

    def make_room(self, version: str, need: int) -> list[Vacated] | None:
        """Free a slot and ``need`` bytes for ``version``, oldest use first.

        Returns:
            What is to be emptied before the room is used; None, with nothing changed, if it cannot.
        """
        now = self._clock()
        pinned = frozenset(self.divide_pins(version, need)[0])
        free, used = len(self.free), self.device_used()
        leave: list[str] = []
        for name, entry in self.holding.items():
            if free and used + need <= self.device_bytes:
                break
            if entry.state != "ready":  # it is on its way there
                continue
            if entry.leases or entry.kept_until > now or name in pinned:
                continue
            assert entry.packed is not None
            leave.append(name)
            free, used = free + 1, used - entry.packed.nbytes
        if not free or used + need > self.device_bytes:
            return None
        self.evictions += len(leave)
        return [self._vacate(name, self.entries[name]) for name in leave]

    def _leave_slot(self, version: str, entry: Entry) -> None:
        """Empty the entry's slot; its factors stay in host memory."""
        self.empty(self._vacate(version, entry))
        self.changed(version)

    def empty(self, vacated: Vacated) -> None:
        """Take the factors out of a slot that is free, or given to another, in the books."""
        self._adapted.uninstall(vacated.slot)
        vacated.packed.leave_device()

    def _vacate(self, version: str, entry: Entry) -> Vacated:
        assert entry.slot is not None
        assert entry.packed is not None
        vacated = Vacated(entry.slot, entry.packed, version)
        self.free.append(entry.slot)
        del self.holding[version]
        self._device_used -= entry.packed.nbytes
        self.changed(version)
        entry.slot, entry.state = None, "absent"
        return vacated

    def to_read(self) -> list[str]:
        """Those that are wanted and not in memory, first asked for first."""
        return [version for version in self.wanted if self.entries[version].packed is None]

    def waiting_bytes(self) -> int:
        """Bytes of those that are whole in memory and wait for slots."""
        packs = (self.entries[version].packed for version in self.wanted)
        # One without its zeros takes up no place in the queue: it is still to be made whole.
        return sum(one.nbytes for one in packs if one is not None and not one.is_compact)

    def next_to_restore(self) -> str | None:
        """The first that is wanted and in memory without its zeros; None while those that are
        whole, and wait for slots, fill the host tier."""
        waiting = self.waiting_bytes()
        if waiting and waiting >= self.host_bytes:
            return None
        packs = ((version, self.entries[version].packed) for version in self.wanted)
        return next((name for name, one in packs if one is not None and one.is_compact), None)

    def to_compact(self) -> tuple[str, PackedAdapter] | None:
        """A pruned adapter out of its slot that still takes the memory of a whole one."""
        self._count()
        for version in list(self._loose):
            entry = self.entries[version]
            if entry.packed is None or not entry.packed.is_loose:
                del self._loose[version]
            elif entry.slot is None and version not in self.wanted:
                return version, entry.packed
        return None

    def trim_host(self) -> None:
        """Bring the host tier into its budget, oldest use first; those that are wanted stay."""
        used = self.host_used()
        if used <= self.host_bytes:
            return
        for version, entry in list(self.entries.items()):
            if used <= self.host_bytes:
                return
            if entry.packed is None or version in self.wanted:
                continue
            if entry.slot is None:
                used -= entry.packed.host_nbytes(in_slot=False)
                self._drop(version)
            else:
                used -= entry.packed.release_host_factors()
                self.changed(version)

    def ready(self, versions: Collection[str]) -> dict[str, int]:
        """The slots of those of ``versions`` that are ready."""
        found = {version: self.entries.get(version) for version in versions}
        return {
            version: entry.slot
            for version, entry in found.items()
            if entry is not None and entry.slot is not None and entry.state == "ready"
        }

    def until_grace_ends(self) -> float | None:
        """Seconds until the first version just placed may leave; None when there is none."""
        now = self._clock()
        ends = [one.kept_until for one in self.holding.values() if one.kept_until > now]
        return max(0.001, min(ends) - now) if ends else None

    def device_used(self) -> int:
        """Bytes of factors in slots."""
        return self._device_used

    def host_used(self) -> int:
        """Bytes of factors out of slots, and of all heads."""
        self._count()
        return self._host_used

    def _count(self) -> None:
        for version in self._uncounted:
            entry = self.entries.get(version)
            if entry is None:
                continue
            packed, now = entry.packed, 0
            if packed is not None:
                now = packed.host_nbytes(in_slot=entry.slot is not None)
                if packed.is_loose:
                    self._loose[version] = None
            self._host_used += now - entry.counted
            entry.counted = now
        self._uncounted.clear()
