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
    every_s: float = 0.01,
) -> None:
    """Return as soon as ``condition()`` is true; fail with ``what`` when it never is.

    It is asked for at once and ever more rarely, at last every ``every_s``: who waits must not take
    the processor from what is waited for.
    """
    end = time.monotonic() + within_s
    pause_s = 0.001
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, every_s)
