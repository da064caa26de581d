"""The books of residency: what is in which slot and tier, what may leave, and what fits.

Pure bookkeeping over the adapters in memory, without a thread or a lock: ``adapters.residency``
calls it with its lock held.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from adapters.errors import StoreFull
from adapters.inject import AdaptedModel
from adapters.packing import PackedAdapter

State = Literal["absent", "loading", "ready", "failed"]
Tier = Literal["device", "host", "loading", "failed"]

PINNED_QUARTERS = 3  # of the device bytes that pinned versions may take


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """Where adapters are at one moment.

    Args:
        tiers: By version; a version not in it is on disk, or unknown.
        device_bytes: Of factors in slots, in the compute dtype.
        host_bytes: Of factors kept out of slots, and of all heads.
        folded_bytes: Of cached folded weights.
        device_capacity_bytes, host_capacity_bytes, folded_capacity_bytes: The budgets.
        slots_used, slots: Slots with an adapter, and all of them.
        pinned: Versions that may not leave.
        pins_without_room: Asked to be pinned, but more than pins may take: served as any other.
        loads, evictions, failures: Since the start.
    """

    tiers: dict[str, Tier]
    device_bytes: int
    host_bytes: int
    folded_bytes: int
    device_capacity_bytes: int
    host_capacity_bytes: int
    folded_capacity_bytes: int
    slots_used: int
    slots: int
    pinned: tuple[str, ...]
    pins_without_room: tuple[str, ...]
    loads: int
    evictions: int
    failures: int


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
    """

    state: State = "loading"
    packed: PackedAdapter | None = None
    slot: int | None = None
    leases: int = 0
    kept_until: float = 0.0  # monotonic; its grace, until first leased
    doomed: bool = False  # dropped while in use
    error: Exception | None = None

    @property
    def tier(self) -> Tier:
        """Where it is, for people."""
        if self.state == "ready":
            return "device"
        if self.state in ("loading", "failed"):
            return self.state
        return "host"


class Tiers:
    """The slots of one device and the host tier behind them.

    Args:
        adapted: Whose slots they are; emptied here, filled by the caller.
        slots: How many.
        device_bytes: Budget of factors in slots.
        host_bytes: Budget of factors out of slots and of all heads.
    """

    def __init__(
        self, adapted: AdaptedModel, *, slots: int, device_bytes: int, host_bytes: int
    ) -> None:
        self.slots = slots
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self.free = list(range(slots, 0, -1))
        self.pinned: tuple[str, ...] = ()  # as asked for; see divide_pins
        self.evictions = 0
        self._adapted = adapted

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

    def make_room(self, version: str, need: int) -> bool:
        """Free a slot and ``need`` bytes for ``version``, oldest use first; if it cannot, do
        nothing: False."""
        now = time.monotonic()
        pinned = frozenset(self.divide_pins(version, need)[0])
        free, used = len(self.free), self.device_used()
        leave: list[str] = []
        for name, entry in self.entries.items():
            if free and used + need <= self.device_bytes:
                break
            if entry.slot is None or entry.state != "ready":  # or it is on its way there
                continue
            if entry.leases or entry.kept_until > now or name in pinned:
                continue
            assert entry.packed is not None
            leave.append(name)
            free, used = free + 1, used - entry.packed.nbytes
        if not free or used + need > self.device_bytes:
            return False
        for name in leave:
            self.leave_slot(self.entries[name])
            self.evictions += 1
        return True

    def leave_slot(self, entry: Entry) -> None:
        """Empty the entry's slot; its factors stay in host memory."""
        assert entry.slot is not None
        assert entry.packed is not None
        self._adapted.uninstall(entry.slot)
        entry.packed.leave_device()
        self.free.append(entry.slot)
        entry.slot, entry.state = None, "absent"

    def next_to_load(self, wanted: Iterable[str]) -> str | None:
        """The first of ``wanted`` that is not whole in memory; None while those that are, and wait
        for slots, fill the host tier."""
        packs = {version: self.entries[version].packed for version in wanted}
        # One without its zeros takes up no place in the queue: it is still to be made whole.
        whole = [one for one in packs.values() if one is not None and not one.is_compact]
        if whole and sum(one.nbytes for one in whole) >= self.host_bytes:
            return None
        return next((name for name, one in packs.items() if one is None or one.is_compact), None)

    def to_compact(self, waiting: Container[str]) -> PackedAdapter | None:
        """A pruned adapter out of its slot that still takes the memory of a whole one."""
        for version, entry in self.entries.items():
            packed = entry.packed if entry.slot is None and version not in waiting else None
            if packed is not None and packed.is_loose:
                return packed
        return None

    def trim_host(self, waiting: Container[str]) -> None:
        """Bring the host tier into its budget, oldest use first; those ``waiting`` stay."""
        used = self.host_used()
        for version, entry in list(self.entries.items()):
            if used <= self.host_bytes:
                return
            if entry.packed is None or version in waiting:
                continue
            if entry.slot is None:
                used -= entry.packed.host_nbytes(in_slot=False)
                del self.entries[version]
            else:
                used -= entry.packed.release_host_factors()

    def device_used(self) -> int:
        """Bytes of factors in slots."""
        return sum(
            entry.packed.nbytes
            for entry in self.entries.values()
            if entry.slot is not None and entry.packed is not None
        )

    def host_used(self) -> int:
        """Bytes of factors out of slots, and of all heads."""
        return sum(
            entry.packed.host_nbytes(in_slot=entry.slot is not None)
            for entry in self.entries.values()
            if entry.packed is not None
        )
