"""A residency over one small layer, and the disk that its loader reads from.

Adapters are read by several threads at once. Where the order in which they arrive matters, a test
either asks for one after the other (``fetch``) or waits until all are in memory (``read_in``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from adapters.errors import CorruptFile
from adapters.layers.inject import AdaptedModel, inject
from adapters.residency.slots import Residency
from tests.stand.tiny_models import FakeWeights, random_factors
from tests.stand.waits import TIMEOUT_S, until

WIDTH = 16
# One layer, rank 2, float32: A and B of 2 x 16 numbers each.
ONE = 2 * 2 * WIDTH * 4
MIB = 1 << 20


def weights_of(version: str, adapted: AdaptedModel, rank: int = 2) -> FakeWeights:
    seed = sum(version.encode())
    factors = random_factors(adapted.signature, ["0"], rank=rank, seed=seed)
    return FakeWeights(
        factors,
        head={"score.weight": torch.ones(2, 8)},
    )


class Disk:
    """What the loader reads from; can be slow, or broken for some versions."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted
        self.reads: list[str] = []
        self.broken: set[str] = set()
        self.ranks: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.changed: Callable[[str, Any], Any] = lambda _, weights: weights
        self.gate = threading.Event()
        self.gate.set()
        self._probes = count()

    def load(self, version: str) -> Any:
        assert self.gate.wait(TIMEOUT_S)
        self.reads.append(version)
        if version in self.broken:
            raise CorruptFile(f"{version} is broken.")
        return self.changed(version, weights_of(version, self.adapted, self.ranks.get(version, 2)))

    def size(self, version: str) -> int:
        return self.sizes.get(version, 0)

    def turn(self, made: Residency) -> None:
        """Have the loader go once, from start to end, through all that waits for a slot now.

        What is in memory and could have been placed has been placed then. A version that cannot
        be read serves as the sign: it fails, is told of at the end of a turn, and takes no room.
        It is read only while what waits leaves room in the host tier.
        """
        probe, told = f"probe{next(self._probes)}", threading.Event()
        self.broken.add(probe)
        made.on_ready(lambda version: told.set() if version == probe else None)
        made.prefetch(probe)
        assert told.wait(TIMEOUT_S), "the loader's thread does nothing"


@contextmanager
def residency(
    *,
    slots: int = 4,
    device_bytes: int = MIB,
    host_bytes: int = MIB,
    grace_s: float = 0.0,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Residency, Disk]]:
    torch.manual_seed(0)
    adapted = inject(model if model is not None else nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    disk = Disk(adapted)
    made = Residency(
        adapted, disk.load, slots=slots, device_bytes=device_bytes, host_bytes=host_bytes,
        folded_bytes=0, dtype=dtype, grace_s=grace_s, size=disk.size, clock=clock,
    )  # fmt: skip
    try:
        yield made, disk
    finally:
        disk.gate.set()
        made.close()


def fetch(made: Residency, *versions: str) -> None:
    """Ask for one after the other, each when the one before it is ready or has failed."""
    for version in versions:
        made.prefetch(version)
        until(
            lambda version=version: made.state(version) in ("ready", "failed"),  # type: ignore[misc]
            f"{version} is neither ready nor failed",
        )


def read_in(made: Residency, disk: Disk, *versions: str) -> None:
    """Ask for all at once, in this order; back when all are in memory and those for whom there is
    room have it."""
    loads = made.snapshot().loads + len(versions)
    for version in versions:
        made.prefetch(version)
    until(lambda: made.snapshot().loads == loads, "not all of them were read")
    disk.turn(made)
