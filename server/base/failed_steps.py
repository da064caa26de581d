"""Which steps over fixed buffers have failed, and how often: they are not tried for ever."""

from __future__ import annotations

import logging
from collections import Counter

from adapters.errors import in_a_line
from server.base.captured_steps import StepKey

logger = logging.getLogger(__name__)

MOST_FAILURES = 3  # of one key


class FailedSteps:
    """Counts failures by key; the log has a line for the first of each, and for the last. One
    thread uses it.

    Args:
        what: A step, as the log names it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._counts: Counter[StepKey] = Counter()

    def note(self, key: StepKey, error: Exception) -> None:
        """A step has failed, and runs the other way."""
        self._counts[key] += 1
        told = in_a_line(error)
        if self._counts[key] == 1:
            logger.warning("%s failed and runs as without it: %s", self._what, told)
        elif self.is_given_up(key):
            logger.warning(
                "%s of up to %d rows failed %d times and is not tried again: %s",
                self._what, key.rows, MOST_FAILURES, told,
            )  # fmt: skip

    def is_given_up(self, key: StepKey) -> bool:
        """Whether a step is not to be tried any more."""
        return self._counts[key] >= MOST_FAILURES
