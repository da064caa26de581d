"""What an engine says of itself: for the gauges, for readiness and for the admin endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
    device: str
    dtype: str


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
