"""The routing of `server.cluster.routing` as a request router of Ray Serve.

Ray Serve makes one in every process that has a handle to the engines. It tells each of the
replicas there are, of what they say of themselves (``record_routing_stats``) and of the queue
lengths that replicas report with every request that they take.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, Final

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster.liveness import AskedReplica, Placed
from server.cluster.replica import Addressed, short
from server.cluster.routing import ReplicaLoad, SpillPolicy, route

# A replica that a call could not reach is asked last for so long, though its process is there.
SHUNNED_S: Final = 2.0
ASKED_AGAIN_S: Final = 0.5  # whether a replica is there that was not


class AffinityRouter(RequestRouter):
    """See the module."""

    def initialize_state(self, **policy: Any) -> None:
        """Called by Ray Serve with ``request_router_kwargs``: the fields of ``SpillPolicy``."""
        self.policy = SpillPolicy(**policy)
        self.routed: Counter[str] = Counter()  # requests by reason
        self.placed = Placed()
        self.silent: set[str] = set()  # replicas whose process does not answer
        self._shunned: dict[str, float] = {}  # by replica: until when, monotonic
        self._looking: dict[str, asyncio.Task[None]] = {}  # for replicas that may be gone
        # Imported here: Ray sends this class with a copy of what its module holds.
        from server.cluster.router_table import ROUTERS

        ROUTERS[self._deployment_id.name] = self

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Called by Ray Serve for each replica that it tells of."""
        return AskedReplica(replica_info, self.placed)

    def on_replica_actor_unavailable(self, replica_id: Any) -> None:
        """Called by Ray Serve where a call broke, as when the replica was killed.

        What is known of its queue is forgotten then, so it would look idle, and have every call.
        """
        super().on_replica_actor_unavailable(replica_id)
        self._shunned[replica_id.unique_id] = time.monotonic() + SHUNNED_S
        replica = self.curr_replicas.get(replica_id)
        if replica is not None:
            self.look_for(replica)

    def reachable(self) -> bool:
        """Whether a replica is there: Ray Serve tells of one, and it is not silent.

        That a call broke says nothing of the replica: it is asked, and counts until it is silent.
        """
        return any(one.unique_id not in self.silent for one in list(self.curr_replicas))

    def look_for(self, replica: AskedReplica) -> None:
        """Begin to ask whether a replica is there, until it answers or is nobody's affair."""
        if replica.name not in self._looking:
            task = asyncio.create_task(self._look_for(replica), name="look-for-replica")
            self._looking[replica.name] = task
            task.add_done_callback(lambda _: self._looking.pop(replica.name, None))

    async def _look_for(self, replica: AskedReplica) -> None:
        try:
            while replica.replica_id in self.curr_replicas or replica in self.placed.by_replica():
                if await replica.greets():
                    replica.heard = time.monotonic()
                    return
                self.silent.add(replica.name)
                await asyncio.sleep(ASKED_AGAIN_S)
        finally:
            self.silent.discard(replica.name)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All replicas, each a rank of its own, in the order in which they are to be asked."""
        if not candidate_replicas:
            return []
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        version, again = None, True
        if pending_request is not None:
            again = pending_request.routing_context.should_backoff
            # Or the next round would follow at once, for ever.
            pending_request.routing_context.should_backoff = True
            message = pending_request.args[0] if pending_request.args else None
            version = getattr(message, "version", None)
            if isinstance(message, Addressed):
                again = True  # no request: not counted
                if message.replica is not None:
                    only = by_name.get(message.replica)
                    return [] if only is None else [[only]]
        now = time.monotonic()
        self._shunned = {name: until for name, until in self._shunned.items() if until > now}
        avoided = self._shunned.keys() | self.silent
        last = [one for name, one in by_name.items() if name in avoided]
        loads = [
            ReplicaLoad(
                name,
                self.replica_queue_len_cache.get(one.replica_id) or 0,
                frozenset((one.routing_stats or {}).get("resident", ())),
            )
            for name, one in by_name.items()
            if name not in avoided
        ]
        if not loads:
            return [[one] for one in last]
        found = route(None if version is None else short(version), loads, self.policy)
        if not again:
            self.routed[found.reason] += 1
        return [[by_name[name]] for name in found.order] + [[one] for one in last]
