"""Waiting for what another thread or process does.

The bound is generous: it says when a test has failed, not how quick anything is, and holds on a
machine that is busy with other things.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT_S = 60.0


def until(
    condition: Callable[[], object],
    what: str = "what was waited for did not come",
    *,
    within_s: float = TIMEOUT_S,
    every_s: float = 0.001,
) -> None:
    """Return as soon as ``condition()`` is true; fail with ``what`` when it never is."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(every_s)
