"""Ways to choose a replica: the one of the product, and those that it is held against.

All see the same: what a router knows of each replica, be it true or stale.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from server.cluster.routing import ReplicaLoad, SpillPolicy, route

Choose = Callable[[str, Sequence[ReplicaLoad]], str]  # version, replicas -> name of one

RING_POINTS: Final = 100  # of each replica
RING_BOUND: Final = 1.25  # of the mean, as Mirrokni, Thorup and Zadimoghaddam have it


def affinity(_seed: int, policy: SpillPolicy | None = None) -> Choose:
    """As the product routes."""
    return lambda version, replicas: route(version, replicas, policy).order[0]


def at_random(seed: int) -> Choose:
    """Any replica."""
    draws = random.Random(f"policy {seed}")
    return lambda _, replicas: draws.choice(replicas).name


def round_robin(_seed: int) -> Choose:
    """One after the other."""
    turn = -1

    def choose(_: str, replicas: Sequence[ReplicaLoad]) -> str:
        nonlocal turn
        turn += 1
        return replicas[turn % len(replicas)].name

    return choose


def least_loaded(seed: int) -> Choose:
    """The one with the fewest requests; any of those that are equal."""
    draws = random.Random(f"policy {seed}")

    def choose(_: str, replicas: Sequence[ReplicaLoad]) -> str:
        fewest = min(one.queued for one in replicas)
        return draws.choice([one for one in replicas if one.queued == fewest]).name

    return choose


def hashed(_seed: int) -> Choose:
    """Consistent hashing: the next one on the ring, whatever it has to do."""
    return lambda version, replicas: _around(version, replicas)[0].name


def hashed_bounded(_seed: int) -> Choose:
    """Consistent hashing with bounded loads: the next on the ring that has room."""

    def choose(version: str, replicas: Sequence[ReplicaLoad]) -> str:
        total = sum(one.queued for one in replicas) + 1
        bound = math.ceil(RING_BOUND * total / len(replicas))
        around = _around(version, replicas)
        return next((one for one in around if one.queued < bound), around[0]).name

    return choose


def _around(version: str, replicas: Sequence[ReplicaLoad]) -> list[ReplicaLoad]:
    by_name = {one.name: one for one in replicas}
    points, names = _ring(tuple(sorted(by_name)))
    start = bisect(points, _point(version))
    order = dict.fromkeys(names[start:] + names[:start])
    return [by_name[name] for name in order]


@lru_cache(maxsize=64)
def _ring(names: tuple[str, ...]) -> tuple[list[int], list[str]]:
    pairs = sorted((_point(f"{name}#{n}"), name) for name in names for n in range(RING_POINTS))
    return [point for point, _ in pairs], [name for _, name in pairs]


@lru_cache(maxsize=1 << 18)
def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


POLICIES: Final[dict[str, Callable[[int], Choose]]] = {
    "affinity": affinity,
    "random": at_random,
    "round robin": round_robin,
    "least loaded": least_loaded,
    "hashed": hashed,
    "hashed, bounded": hashed_bounded,
}
