"""Processes that do nothing but calculate, to measure beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ALWAYS = "while True: pass"
# So much processor time in each period, as a process has that answers many small calls.
_PARTLY = """
import sys, time
share, period = float(sys.argv[1]), 0.004
while True:
    end = time.thread_time() + share * period
    while time.thread_time() < end:
        pass
    time.sleep((1.0 - share) * period)
"""


@contextmanager
def busy_processes(count: int, share: float | None = None) -> Iterator[None]:
    """``count`` processes that calculate, at the priority of this one, meanwhile.

    Args:
        count: Of them.
        share: Of a core that each takes, above 0 and below 1; None: all that it gets.
    """
    code = [_ALWAYS] if share is None else [_PARTLY, str(share)]
    busy = [subprocess.Popen([sys.executable, "-c", *code]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()
