"""Which steps over fixed buffers fail time after time: they are not tried for ever.

What a request or an adapter does wrong says nothing of the step: whoever runs it again the other
way finds out, and such a failure is not counted.
"""

from __future__ import annotations

import logging
from collections import Counter

from adapters.errors import in_a_line
from server.base.captured_steps import StepKey

logger = logging.getLogger(__name__)

MOST_FAILURES = 3  # of one key, with no success between them


class FailedSteps:
    """Counts failures in a row by key; the log has a line for the first of each row, and for the
    last. One thread uses it.

    Args:
        what: A step, as the log names it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._counts: Counter[StepKey] = Counter()
        self._held: list[tuple[StepKey, Exception]] = []  # nobody knows yet who is at fault

    def note(self, key: StepKey, error: Exception) -> None:
        """A step has failed that runs the other way: no request is at fault."""
        self._counts[key] += 1
        told = in_a_line(error)
        if self._counts[key] == 1:
            logger.warning("%s failed and runs as without it: %s", self._what, told)
        elif self._counts[key] == MOST_FAILURES:
            logger.warning(
                "%s of up to %d rows failed %d times in a row and is not tried again: %s",
                self._what, key.rows, MOST_FAILURES, told,
            )  # fmt: skip

    def hold(self, key: StepKey, error: Exception) -> None:
        """A step has failed, and what it was to compute has not run the other way yet."""
        self._held.append((key, error.with_traceback(None)))

    def judge(self, *, by_request: bool) -> None:
        """What was held has run the other way.

        Args:
            by_request: A request, or its adapter, has failed there as well.
        """
        held, self._held = self._held, []
        if not by_request:
            for key, error in held:
                self.note(key, error)

    def worked(self, key: StepKey) -> None:
        """A step has told its answers: what failed before it is not counted any more, but for what
        is held."""
        if not any(one == key for one, _ in self._held):
            self._counts.pop(key, None)

    def is_given_up(self, key: StepKey) -> bool:
        """Whether a step is not to be tried any more, or not until what is held is judged."""
        held = sum(one == key for one, _ in self._held)
        return self._counts[key] + held >= MOST_FAILURES
