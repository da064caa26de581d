"""When which break was under way, and so which failures of clients are excused by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

AFTER_S: Final = 2.0  # for clients that were told, and come again while others still start


@dataclass
class Window:
    """One break: from its first harm until the service was seen whole again."""

    kind: str
    began: float  # monotonic
    ended: float | None = None  # None while it lasts

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.began


@dataclass
class Windows:
    """All breaks of a run, in order."""

    all: list[Window] = field(default_factory=list)

    @contextmanager
    def during(self, kind: str) -> Iterator[Window]:
        window = Window(kind, time.monotonic())
        self.all.append(window)
        try:
            yield window
        finally:
            window.ended = time.monotonic()

    def cover(self, began: float, ended: float) -> str | None:
        """The kind of a break that was under way at some time between two moments."""
        for window in reversed(self.all):
            over = window.ended
            if window.began <= ended and (over is None or began <= over + AFTER_S):
                return window.kind
        return None
