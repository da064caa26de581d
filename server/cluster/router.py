"""The routing of `server.cluster.routing` as a request router of Ray Serve.

Ray Serve makes one in every process that has a handle to the engines. It tells each of the
replicas there are, of what they say of themselves (``record_routing_stats``) and of the queue
lengths that replicas report with every request that they take.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster.replica import Addressed, short
from server.cluster.routing import ReplicaLoad, SpillPolicy, route


class AffinityRouter(RequestRouter):
    """See the module."""

    def initialize_state(self, **policy: Any) -> None:
        """Called by Ray Serve with ``request_router_kwargs``: the fields of ``SpillPolicy``."""
        self.policy = SpillPolicy(**policy)
        self.routed: Counter[str] = Counter()  # requests by reason
        # Imported here: Ray sends this class with a copy of what its module holds.
        from server.cluster.router_table import ROUTERS

        ROUTERS[self._deployment_id.name] = self

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
        loads = [
            ReplicaLoad(
                name,
                self.replica_queue_len_cache.get(one.replica_id) or 0,
                frozenset((one.routing_stats or {}).get("resident", ())),
            )
            for name, one in by_name.items()
        ]
        found = route(None if version is None else short(version), loads, self.policy)
        if not again:
            self.routed[found.reason] += 1
        return [[by_name[name]] for name in found.order]
