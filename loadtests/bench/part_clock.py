"""The time that one part of a bench may take: what no longer fits is left out, and said."""

from __future__ import annotations

import time

from loadtests.bench.timing import Report


class PartClock:
    """Counts from when it is made.

    Args:
        report: Where it is said what was left out.
        part: Its name.
        seconds: That it may take.
    """

    def __init__(self, report: Report, part: str, seconds: float) -> None:
        self._report = report
        self._part = part
        self._ends = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._ends - time.monotonic()

    def has_time(self, what: str, least_s: float = 0.0) -> bool:
        """Whether ``what`` may begin; if not, the report says that it was left out.

        Args:
            what: In the words of the report.
            least_s: That it takes at least.
        """
        if self.left_s > least_s:
            return True
        self._report.leave_out(f"{self._part}: {what}: its time was up")
        return False
