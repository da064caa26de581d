"""Processes that do nothing but calculate, to measure beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ALWAYS = "while True: pass"
# So much processor time in each period, as a process has that answers many small calls. What others
# keep from it in one period it takes later.
_PARTLY = """
import os, sys, time
share, period, began = float(sys.argv[1]), 0.004, time.monotonic()
os.nice(int(sys.argv[2]))
start = time.process_time()
while True:
    due = share * (time.monotonic() - began)
    while time.process_time() - start < due:
        pass
    time.sleep(period)
"""


@contextmanager
def busy_processes(count: int, share: float | None = None, niceness: int = 0) -> Iterator[None]:
    """``count`` processes that calculate meanwhile.

    Args:
        count: Of them.
        share: Of a core that each takes, below 1, if it can be had; None: all that it gets.
        niceness: Above this process's, of those that take a share.
    """
    code = [_ALWAYS] if share is None else [_PARTLY, str(share), str(niceness)]
    busy = [subprocess.Popen([sys.executable, "-c", *code]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()
