"""What an engine says of itself: for the gauges, for readiness and for the admin endpoints."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch

SPARE_S: Final = 5.0  # more than the HTTP processes take to tell of a new name
LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The latest forward: in which lane, of how many sequences and adapters, how long."""

    lane: str
    rows: int
    adapters: int  # the base not counted
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """How the engine stands, by the label values of the gauges.

    Args:
        queue_depth: Requests that wait or run, by lane.
        base_bytes: Of the base, by part.
        adapter_bytes: Of adapters, by tier.
        adapters: Versions, by tier.
        slots, slots_used: Places on the device.
        kv_blocks: Of the generate lane, by state.
        cuda_bytes: Of the device, by kind; empty on the CPU.
        totals: Counters since the start.
        residency: The tier of each version that is not only on disk.
        pinned: Versions that stay on the device.
        pins_without_room: Pinned by name, but beyond what pins may take of the device.
        device, dtype: Where and in what everything is computed.
    """

    queue_depth: Mapping[str, int]
    base_bytes: Mapping[str, int]
    adapter_bytes: Mapping[str, int]
    adapters: Mapping[str, int]
    kv_blocks: Mapping[str, int]
    cuda_bytes: Mapping[str, int]
    totals: Mapping[str, int]
    slots: int
    slots_used: int
    residency: Mapping[str, str]
    pinned: tuple[str, ...]
    pins_without_room: tuple[str, ...]
    device: str
    dtype: str


class Names:
    """Which adapter versions a name is on, as last told.

    A version is in use before the worker hears of its name, and may be asked for again just after
    it has lost it; so what was asked for lately counts as named.

    Args:
        spare_s: How lately.
    """

    def __init__(self, spare_s: float = SPARE_S) -> None:
        self.named: frozenset[str] | None = None  # None: nothing is known
        self.spare_s = spare_s
        self._asked: dict[str, float] = {}
        self._looked = 0.0

    def ask(self, version: str) -> None:
        """A request for ``version`` has come."""
        self._asked[version] = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return self.named is not None and time.monotonic() - self._looked >= LOOK_S

    def unnamed(self, versions: Collection[str]) -> set[str]:
        """Those of ``versions`` that have no name and were not asked for lately."""
        if self.named is None:
            return set()
        self._looked = time.monotonic()
        since = self._looked - self.spare_s
        self._asked = {version: at for version, at in self._asked.items() if at > since}
        return set(versions) - self.named - self._asked.keys()


def cuda_bytes(device: torch.device) -> dict[str, int]:
    """Memory of the device, by kind; empty on the CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": free,
        "total": total,
    }
