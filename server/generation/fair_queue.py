"""Requests that wait to generate: one queue per adapter version, served in turn.

Pure book-keeping, no torch and no clock. It says whose turn it is; whether there is room, and
whether the adapter is there, is judged by the lane that asks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from server.messages import GenerateRequest

# How often others may be admitted past a request that is too large for the room there is now. After
# that nobody is, until it fits: small requests cannot starve a large one.
PATIENCE_ADMISSIONS = 32


class FairQueue:
    """Waiting requests, round robin between adapter versions, in order within each."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str | None, deque[GenerateRequest]] = OrderedDict()
        self._versions: dict[str, str | None] = {}
        self._passed: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._versions

    @property
    def versions(self) -> tuple[str | None, ...]:
        """Versions with waiting requests, the one whose turn it is first."""
        return tuple(self._queues)

    def push(self, request: GenerateRequest) -> None:
        """Queue a request behind the others of its version."""
        self._queues.setdefault(request.version, deque()).append(request)
        self._versions[request.id] = request.version

    def heads(self) -> Iterator[GenerateRequest]:
        """The oldest request of each version, in turn. The queue may change meanwhile."""
        for version in self.versions:
            if version in self._queues:
                yield self._queues[version][0]

    def take(self, request: GenerateRequest, passed: list[GenerateRequest]) -> None:
        """Take a head out and end its version's turn; it was admitted past ``passed``."""
        self.remove(request.id)
        if request.version in self._queues:
            self._queues.move_to_end(request.version)
        for other in passed:
            self._passed[other.id] = self._passed.get(other.id, 0) + 1

    def is_impatient(self, request: GenerateRequest) -> bool:
        """Whether so many were admitted past this request that no more may be."""
        return self._passed.get(request.id, 0) >= PATIENCE_ADMISSIONS

    def remove(self, request_id: str) -> bool:
        """Forget a request; False if it does not wait here."""
        if request_id not in self._versions:
            return False
        version = self._versions.pop(request_id)
        queue = self._queues[version]
        del queue[next(i for i, request in enumerate(queue) if request.id == request_id)]
        self._passed.pop(request_id, None)
        if not queue:
            del self._queues[version]
        return True

    def remove_version(self, version: str | None) -> list[GenerateRequest]:
        """Forget all requests of a version and return them, oldest first."""
        requests = list(self._queues.get(version, ()))
        for request in requests:
            self.remove(request.id)
        return requests
