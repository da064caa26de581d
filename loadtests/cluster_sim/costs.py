"""What a step and a load take, as parameters; the steps of the presets are measured figures.

The steps are solved from the three figures of docs/measured.md, "On a GPU" (NVIDIA H200): a step
takes `fixed + rows * row + adapters * adapter`. Prompts were not measured: one takes a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

READ_BYTES_PER_S: Final = 0.5e9  # assumed: a disk, or an object store near by
COPY_BYTES_PER_S: Final = 5e9  # assumed: host memory to device, not pinned
READ_FIXED_S: Final = 0.02  # assumed: to open and check an adapter


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Three measured steps, in milliseconds.

    Args:
        few: 16 sequences on 16 adapters.
        many: 64 sequences on 16 adapters.
        bare: 16 sequences on the bare base.
    """

    few: float
    many: float
    bare: float


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """The costs of one replica.

    Args:
        fixed_s: Of any step.
        row_s: Of each row of a step.
        adapter_s: Of each distinct adapter of a step.
        adapter_bytes: Of one adapter, in the store and in memory.
        read_s: From the store into host memory.
        copy_s: From host memory into a slot.
        stall_s: By which a step is longer for each adapter that came into a slot meanwhile.
    """

    fixed_s: float
    row_s: float
    adapter_s: float
    adapter_bytes: int
    read_s: float
    copy_s: float
    stall_s: float

    def step_s(self, rows: int, adapters: int) -> float:
        """Seconds of a step of so many rows on so many distinct adapters."""
        return self.fixed_s + rows * self.row_s + adapters * self.adapter_s


def costs_of(figures: StepFigures, adapter_bytes: int) -> EngineCosts:
    """Solve the figures of steps; loads by the bytes of an adapter."""
    row_ms = (figures.many - figures.few) / (64 - 16)
    copy_s = adapter_bytes / COPY_BYTES_PER_S
    return EngineCosts(
        fixed_s=(figures.bare - 16 * row_ms) / 1e3,
        row_s=row_ms / 1e3,
        adapter_s=(figures.few - figures.bare) / 16 / 1e3,
        adapter_bytes=adapter_bytes,
        read_s=READ_FIXED_S + adapter_bytes / READ_BYTES_PER_S,
        copy_s=copy_s,
        stall_s=copy_s,  # assumed: a copy holds the device up for as long as it takes
    )


def hira_bytes(hidden: int, key: int, intermediate: int, layers: int, rank: int = 32) -> int:
    """Of the factors on q, k, v, up and down of a Llama, in bfloat16.

    Args:
        hidden: Width.
        key: Width of keys, all heads together.
        intermediate: Width inside the MLP.
        layers: Of the model.
        rank: Of the factors.
    """
    sides = 2 * hidden + 2 * (hidden + key) + 2 * (hidden + intermediate)
    return 2 * rank * layers * sides


PRESETS: Final = {
    "1.2B": costs_of(StepFigures(30.9, 32.9, 25.1), hira_bytes(2048, 512, 8192, 16)),
    "8B": costs_of(StepFigures(79.1, 88.8, 49.3), hira_bytes(4096, 1024, 14336, 32)),
}
