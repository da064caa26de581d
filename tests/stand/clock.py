"""A clock that stands until a test moves it, for what is given its clock."""

from __future__ import annotations


class FakeClock:
    """Called, it says its time in seconds, as ``time.monotonic`` does."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
