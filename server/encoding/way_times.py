"""Which of two ways is the faster, by a bucket of what they run on: both are timed on traffic.

Of a batch of texts, a graph spares the host, which is what small batches wait for; large ones wait
for the device, and without a graph they may use kernels that a graph cannot. Of heads, one product
for all of them spares launches, and copies their numbers.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, Literal, TypeVar

Way = Literal["static", "unpadded"]
WAYS: Final[tuple[Way, ...]] = ("static", "unpadded")
HeadWay = Literal["together", "apart"]
HEAD_WAYS: Final[tuple[HeadWay, ...]] = ("together", "apart")
# Batches of a bucket that are timed each way: at first, kernels are compiled and timed themselves.
TIMED_BATCHES: Final = 8
_Name = TypeVar("_Name", bound=str)


class WayTimes(Generic[_Name]):
    """The least seconds of each way, by bucket. One thread uses it.

    Args:
        ways: Their names.
    """

    def __init__(self, ways: tuple[_Name, ...]) -> None:
        self._ways = ways
        self._seconds: dict[Hashable, dict[_Name, list[float]]] = {}

    def is_due(self, bucket: Hashable) -> bool:
        """Whether the next batch of a bucket is to be timed."""
        return any(len(times) < TIMED_BATCHES for times in self._of(bucket).values())

    def way(self, bucket: Hashable) -> _Name:
        """How the next batch of a bucket is to run: each way in turn, and then the fastest."""
        known = self._of(bucket)
        if self.is_due(bucket):
            return min(self._ways, key=lambda one: len(known[one]))
        return min(self._ways, key=lambda one: min(known[one]))

    def note(self, bucket: Hashable, way: _Name, seconds: float) -> None:
        """A batch of a bucket took so many seconds, of whatever is alike in a bucket."""
        self._of(bucket)[way].append(seconds)

    def _of(self, bucket: Hashable) -> dict[_Name, list[float]]:
        return self._seconds.setdefault(bucket, {way: [] for way in self._ways})
