"""Simulated time: what is to happen, in the order of its time and then of its asking."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class SimulatedClock:
    """Runs acts one after another; ``now_s`` is the time of the present one, in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Have ``act`` called in ``delay_s`` seconds."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._count), act))

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Run until ``goes_on`` says no, or nothing is left."""
        while self._events and goes_on():
            self.now_s, _, act = heapq.heappop(self._events)
            act()
