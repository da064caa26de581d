"""Has Ray's workers forked from a process that has the modules, as `forked_servers` has its own.

Ray starts each worker as a new Python that imports torch and all of the server, for seconds. Here
``sys.executable`` of the process that starts Ray is a script that has such a worker forked and runs
everything else as ever. A worker has another process id than Ray started, which Ray expects of
workers in containers.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.stand.ray_launcher import WORKER_FD

LARGEST: Final = 1 << 20  # bytes of a message
# The first argument is the file of Ray's worker, the others are for it.
RUN: Final = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
SCRIPT: Final = """#!/bin/sh
case "$1" in
*/setup_worker.py) exec {python} -I -S {launcher} {socket} "$@" ;;
*) exec {python} "$@" ;;
esac
"""

Fork = Callable[[dict[str, Any], Sequence[int]], int]


def use_forks(fork: Fork) -> None:
    """From now on Ray's workers are forks, in this process and what it starts.

    Args:
        fork: Makes a process that runs ``arguments`` in ``environment``, with files of its own
            under the numbers ``fds``; returns its id.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    # Before what Ray registers, which is then done first.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, script = folder / "workers", folder / "python"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    launcher = Path(__file__).with_name("ray_launcher.py")
    script.write_text(SCRIPT.format(python=sys.executable, launcher=launcher, socket=path))
    script.chmod(0o700)
    sys.executable = str(script)
    threading.Thread(target=_serve, args=(listener, fork), daemon=True).start()


def _serve(listener: socket.socket, fork: Fork) -> None:
    while True:
        one, _ = listener.accept()
        with one:
            try:
                _serve_one(one, fork)
            except Exception:  # noqa: BLE001  # this start has failed: its connection ends, and so it
                traceback.print_exc()


def _serve_one(one: socket.socket, fork: Fork) -> None:
    message, fds, _, _ = socket.recv_fds(one, LARGEST, 3)
    try:
        if message:
            asked = json.loads(message)
            told = {
                "arguments": ["-c", RUN, *asked["arguments"]],
                "environment": asked["environment"],
                "fds": [0, 1, 2, WORKER_FD],
            }
            fork(told, [*fds, one.fileno()])
    finally:
        for given in fds:
            os.close(given)
