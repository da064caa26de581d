"""Which replica answers a request: affinity to its adapter, with spill-over to others.

Every version has an order of the replicas of its own, worked out from names alone (rendezvous
hashing), so all routers agree on it without a word, and a replica that comes or goes moves only
the versions that it gains or had. A request goes to the first replica in that order that is not
busy; of those that are not busy, one that has the adapter resident goes before one that has not.
So a cold adapter is resident in one replica, a popular one in as many as its traffic fills, and
when the traffic falls it is back in one.

Pure functions: no clock, no chance, no Ray; the simulation runs this code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

SPILL_REQUESTS: Final = 8
SPILL_FACTOR: Final = 1.25
ORDERS_KEPT: Final = 1 << 16  # ranks that are remembered, of a version in a replica

Reason = Literal["resident", "placed", "spilled", "base"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica as a router sees it.

    Args:
        name: Of the replica; never reused by another.
        queued: Requests that wait or run there, from all routers.
        resident: Versions on its device.
    """

    name: str
    queued: int
    resident: Collection[str]


@dataclass(frozen=True, slots=True)
class SpillPolicy:
    """When a replica counts as busy: with more requests than both figures allow.

    Args:
        requests: So many are never too many: a batch takes them together.
        factor: Of the mean of all replicas.
    """

    requests: int = SPILL_REQUESTS
    factor: float = SPILL_FACTOR

    def bound(self, replicas: Sequence[ReplicaLoad]) -> float:
        """How many requests a replica may have and still not be busy."""
        mean = sum(one.queued for one in replicas) / max(1, len(replicas))
        return max(float(self.requests), self.factor * mean)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Args:
        order: Every replica once, by name: the chosen one, and who is next should it not take the
            request.
        reason: ``resident``: the adapter is there; ``placed``: it is nowhere yet, and goes to the
            first of its order; ``spilled``: it is somewhere else, where it is too busy; ``base``:
            no adapter is asked for.
    """

    order: tuple[str, ...]
    reason: Reason


def route(
    version: str | None, replicas: Sequence[ReplicaLoad], policy: SpillPolicy | None = None
) -> Route:
    """Choose a replica for one request.

    Args:
        version: Of the adapter; None for the bare base, which every replica has.
        replicas: All that may be chosen; one at least.
        policy: When one counts as busy.

    Raises:
        ValueError: There are no replicas.
    """
    if not replicas:
        raise ValueError("a request cannot be routed where there is no replica")
    by_load = sorted(replicas, key=lambda one: (one.queued, one.name))
    if version is None:
        return Route(tuple(one.name for one in by_load), "base")
    bound = (policy or SpillPolicy()).bound(replicas)
    own = sorted(replicas, key=lambda one: _place_in_order(version, one.name))
    free = [one for one in own if one.queued < bound]
    chosen = next((one for one in free if version in one.resident), None)
    if chosen is None:
        # Where all are busy, those that have the adapter are as good as others, and spare a load.
        held = [one for one in by_load if version in one.resident]
        chosen = free[0] if free else (held or by_load)[0]
    if version in chosen.resident:
        reason: Reason = "resident"
    elif any(version in one.resident for one in replicas) or chosen is not own[0]:
        reason = "spilled"
    else:
        reason = "placed"
    rest = (one.name for one in by_load if one is not chosen)
    return Route((chosen.name, *rest), reason)


@lru_cache(maxsize=ORDERS_KEPT)
def _place_in_order(version: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{version}\0{replica}".encode(), digest_size=8).digest()
