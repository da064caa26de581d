"""Makes the calling thread give way to the threads that answer requests, as far as the system can.

On a CPU server loading an adapter and running a batch compete for the same cores. The work of a
loader is short and many times smaller than a batch's, so it takes what is left over.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

import torch

# Nine levels below the default weigh about a tenth when a core is wanted by both.
_NICE: Final = 10


def step_back() -> bool:
    """Lower the calling thread's priority and keep its tensor operations on one core.

    Nothing is raised where the system cannot: the thread then runs as any other.

    Returns:
        Whether the priority was lowered.
    """
    _one_thread()
    if sys.platform != "linux":  # elsewhere a priority is the whole process's
        return False
    try:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
    except OSError:
        return False
    return True


def _one_thread() -> None:
    """OpenMP's own setting of the calling thread: torch's would change the whole process."""
    torch.get_num_threads()  # the first use in a thread sets it from torch's own
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A look-up in a library also searches those that it is linked with.
        library: Any = ctypes.CDLL(str(path))
        library.omp_set_num_threads(1)
    except (OSError, AttributeError):  # built without OpenMP
        return
