"""Looks at a server's processes while load runs: resident memory, file descriptors, threads."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from loadtests.servers import Server

KINDS = ("resident_bytes", "descriptors", "threads")
Sample = dict[str, dict[str, int]]  # by role, by kind


@dataclass(frozen=True)
class Trend:
    """A straight line through samples: its slope, and the 95 % interval of that."""

    per_minute: float
    low: float
    high: float
    first: float  # the line's value at the first sample
    last: float

    @property
    def is_noise(self) -> bool:
        """Whether no growth is proved."""
        return self.low <= 0.0


class Watch:
    """Samples every ``every_s`` seconds in a thread of its own, for the length of a block."""

    def __init__(self, server: Server, every_s: float = 1.0) -> None:
        self.server, self.every_s = server, every_s
        self.at: list[float] = []  # seconds since the beginning
        self.samples: list[Sample] = []
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        self._over.set()
        self._thread.join()

    def series(self, role: str, kind: str) -> tuple[list[float], list[int]]:
        """Times and values of one role; leaves out moments at which it was not there."""
        kept = [
            (at, sample[role][kind])
            for at, sample in zip(self.at, self.samples, strict=True)
            if role in sample
        ]
        return [at for at, _ in kept], [value for _, value in kept]

    def roles(self) -> list[str]:
        return sorted({role for sample in self.samples for role in sample})

    def peak(self, kind: str, since_s: float = 0.0, until_s: float = math.inf) -> dict[str, int]:
        """The most of each role within a stretch of time."""
        found: dict[str, int] = {}
        for at, sample in zip(self.at, self.samples, strict=True):
            if since_s <= at <= until_s:
                for role, values in sample.items():
                    found[role] = max(found.get(role, 0), values[kind])
        return found

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    def _run(self) -> None:
        while not self._over.is_set():
            sample = look(self.server)
            self.at.append(self.now_s)
            self.samples.append(sample)
            self._over.wait(self.every_s)


def look(server: Server) -> Sample:
    """One sample of every process that is there."""
    found: Sample = {}
    for role, pid in server.roles().items():
        try:
            one = psutil.Process(pid)
            with one.oneshot():
                found[role] = {
                    "resident_bytes": one.memory_info().rss,
                    "descriptors": one.num_fds(),
                    "threads": one.num_threads(),
                }
        except psutil.NoSuchProcess:
            continue
    return found


def trend(at_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares, with an interval that allows for samples that resemble their neighbours.

    Memory moves in steps that stay, so neighbouring residuals are alike and the textbook interval
    is far too narrow: the number of samples is cut down by their first autocorrelation.
    """
    count = len(values)
    if count < 3:
        raise ValueError(f"{count} samples make no trend")
    at = [one / 60.0 for one in at_s]
    mean_at, mean = statistics.fmean(at), statistics.fmean(values)
    spread = sum((one - mean_at) ** 2 for one in at)
    pairs = list(zip(at, values, strict=True))
    slope = sum((one - mean_at) * (value - mean) for one, value in pairs) / spread
    residuals = [value - mean - slope * (one - mean_at) for one, value in pairs]
    squares = sum(one * one for one in residuals)
    half = 0.0
    if squares > 0:
        alike = sum(a * b for a, b in itertools.pairwise(residuals)) / squares
        alike = min(max(alike, 0.0), 0.99)
        independent = max(3.0, count * (1 - alike) / (1 + alike))
        error = math.sqrt(squares / (count - 2) / spread) * math.sqrt(count / independent)
        half = _student(independent - 2) * error
    first, last = (mean + slope * (one - mean_at) for one in (at[0], at[-1]))
    return Trend(slope, slope - half, slope + half, first, last)


def _student(freedom: float) -> float:
    """The 97.5 % point of Student's t, near enough for an interval."""
    if freedom <= 1.5:
        return 12.7
    return 1.96 + 2.4 / freedom + 3.5 / freedom**2 + 3.0 / freedom**4
