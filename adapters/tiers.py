"""The books of residency: what is in which slot and tier, what may leave, and what fits.

Pure bookkeeping over the adapters in memory, without a thread or a lock: ``adapters.residency``
calls it with its lock held.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from adapters.errors import StoreFull
from adapters.inject import AdaptedModel
from adapters.packing import PackedAdapter

State = Literal["absent", "loading", "ready", "failed"]
Tier = Literal["device", "host", "loading", "failed"]


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
        self.pinned: tuple[str, ...] = ()
        self.evictions = 0
        self._adapted = adapted

    def obstacle(self, version: str, need: int) -> Exception | None:
        """Why ``version`` can never have a slot as things are, or None."""
        stay = [
            entry.packed.nbytes
            for name, entry in self.entries.items()
            if name in self.pinned and name != version and entry.slot and entry.packed
        ]
        if len(stay) < self.slots and sum(stay) + need <= self.device_bytes:
            return None
        return StoreFull(
            "The adapter does not fit beside the pinned ones." if stay
            else "The adapter is larger than the memory for adapters.",
            found=f"{need} bytes, {len(stay)} pinned adapters of {sum(stay)} bytes",
            expected=f"{self.device_bytes} bytes and {self.slots} slots in all",
            fix="Pin fewer adapters, or allow more slots or memory.",
        )  # fmt: skip

    def make_room(self, need: int) -> bool:
        """Free a slot and ``need`` bytes, oldest use first; if it cannot, do nothing: False."""
        now = time.monotonic()
        free, used = len(self.free), self.device_used()
        leave: list[str] = []
        for version, entry in self.entries.items():
            if free and used + need <= self.device_bytes:
                break
            if entry.slot is None or entry.leases or entry.kept_until > now:
                continue
            if version in self.pinned:
                continue
            assert entry.packed is not None
            leave.append(version)
            free, used = free + 1, used - entry.packed.nbytes
        if not free or used + need > self.device_bytes:
            return False
        for version in leave:
            self.leave_slot(self.entries[version])
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
