"""No process outlives the main one, and none dies of a signal that was not meant for it.

The kernel kills a child when the thread that made it ends (PR_SET_PDEATHSIG), so children are made
by the main thread only. Elsewhere than on Linux there is no such call and nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when ``parent``, its maker, is gone."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died between the fork and the call
        os._exit(1)


def bind_forked_children() -> None:
    """From now on every process that this one forks dies with it and heeds no signal.

    Covers the queue server of multiprocessing and LitServe's HTTP processes; a spawned worker calls
    `die_with_parent` itself.
    """
    parent = os.getpid()

    def in_child() -> None:
        if os.getppid() == parent:  # not the children of children
            # A terminal sends Ctrl-C, and systemd SIGTERM, to all of us at once; the main process
            # decides when the others end. The HTTP processes take SIGTERM up again.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            die_with_parent(parent)

    os.register_at_fork(after_in_child=in_child)
