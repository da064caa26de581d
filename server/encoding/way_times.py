"""Which way a batch of texts runs the faster, by its bucket of tokens: both are timed on traffic.

A graph spares the host, which is what small batches wait for; large ones wait for the device, and
without a graph they may use kernels that a graph cannot.
"""

from __future__ import annotations

from typing import Final, Literal

Way = Literal["static", "unpadded"]
WAYS: Final[tuple[Way, ...]] = ("static", "unpadded")
# Batches of a bucket that are timed each way: at first, kernels are compiled and timed themselves.
TIMED_BATCHES: Final = 8


class WayTimes:
    """The least seconds a token of both ways, by bucket. One thread uses it."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[Way, list[float]]] = {}

    def is_due(self, bucket: int) -> bool:
        """Whether the next batch of a bucket is to be timed."""
        return any(len(times) < TIMED_BATCHES for times in self._of(bucket).values())

    def way(self, bucket: int) -> Way:
        """How the next batch of a bucket is to run: both in turn, and then the faster."""
        known = self._of(bucket)
        if self.is_due(bucket):
            return min(WAYS, key=lambda one: len(known[one]))
        return min(WAYS, key=lambda one: min(known[one]))

    def note(self, bucket: int, way: Way, seconds: float) -> None:
        """A batch of a bucket took so many seconds a token."""
        self._of(bucket)[way].append(seconds)

    def _of(self, bucket: int) -> dict[Way, list[float]]:
        return self._seconds.setdefault(bucket, {way: [] for way in WAYS})
