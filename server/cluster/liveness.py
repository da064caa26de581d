"""Whether the process of a replica is there, whatever its engine does, and what was sent to it.

A process that was killed closes its connections when its last thread has ended, which takes seconds
where the processors are busy, and a machine that is gone closes none. So a replica that says
nothing is asked over a connection of its own: gRPC's threads answer that as long as the process
lives, and wait neither for Python nor for a step of the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import Any, Final

from ray._private.grpc_utils import init_grpc_channel
from ray.serve.request_router import PendingRequest, RunningReplica

GREETED_WITHIN_S: Final = 0.5
GREETED_TRIES: Final = 2  # one may be late on this side as well


async def greets(address: str, within_s: float = GREETED_WITHIN_S) -> bool:
    """Whether a gRPC server answers a new connection.

    Args:
        address: ``host:port``.
        within_s: Until then; of each of ``GREETED_TRIES``.
    """
    for _ in range(GREETED_TRIES):
        if await _connects(address, within_s):
            return True
    return False


async def _connects(address: str, within_s: float) -> bool:
    # Channels to one address share a connection unless told otherwise. This way of Ray's to make
    # one brings its TLS and its tokens.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = init_grpc_channel(address, options=options, asynchronous=True)
    try:
        async with asyncio.timeout(within_s):
            while (state := channel.get_state(try_to_connect=True)).name != "READY":
                if state.name in {"TRANSIENT_FAILURE", "SHUTDOWN"}:
                    return False
                await channel.wait_for_state_change(state)
            return True
    except TimeoutError:
        return False
    finally:
        await channel.close()


class AskedReplica(RunningReplica):
    """A replica that notes which requests it was given and when it was last heard.

    Args:
        replica_info: As Ray Serve tells of it.
        placed: Of its router.
    """

    def __init__(self, replica_info: Any, placed: Placed) -> None:
        super().__init__(replica_info)
        self.name: str = replica_info.replica_id.unique_id
        self.heard = time.monotonic()
        self._address = f"{replica_info.node_ip}:{replica_info.port}"
        self._placed = placed

    async def greets(self) -> bool:
        """Whether its process is there."""
        return await greets(self._address)

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        """Called by Ray Serve with a request that goes to this replica."""
        request_id = getattr(pr.args[0], "id", None) if pr.args else None
        if request_id is not None:
            self._placed.put(request_id, self)
        return super().try_send_request(pr, with_rejection)


class Placed:
    """Which replica has each request, by the ids with which they were sent."""

    def __init__(self) -> None:
        self._replicas: dict[str, AskedReplica] = {}
        self._requests: dict[AskedReplica, set[str]] = {}

    def put(self, request_id: str, replica: AskedReplica) -> None:
        """It was sent there now."""
        self.take(request_id)
        if replica not in self._requests:
            replica.heard = time.monotonic()  # there was nothing to hear before
        self._replicas[request_id] = replica
        self._requests.setdefault(replica, set()).add(request_id)

    def take(self, request_id: str) -> None:
        """It has ended, if it was there."""
        replica = self._replicas.pop(request_id, None)
        if replica is not None:
            left = self._requests[replica]
            left.discard(request_id)
            if not left:
                del self._requests[replica]

    def where(self, request_id: str) -> AskedReplica | None:
        """Who has it; None while nobody has."""
        return self._replicas.get(request_id)

    def by_replica(self) -> Mapping[AskedReplica, Collection[str]]:
        """The requests of each replica that has any."""
        return self._requests
