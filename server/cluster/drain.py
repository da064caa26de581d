"""How a cluster on one machine drains: its HTTP replicas refuse new requests, and finish what they
have, before Ray Serve takes them away.

They are told by a file of their run folder, for a handle of Ray Serve's reaches one of them and
not all; and each says in a file of its own how many requests it has.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.worker_state import replace_text

PHASE_LOOK_S: Final = 0.1
ENDED_AFTER_S: Final = 1.0  # for requests that are ended, until their answers are out
PHASE_FILE: Final = "phase"


def drain(run_dir: Path, http_replicas: int, drain_s: float) -> None:
    """Have all HTTP replicas of this machine drain, and end what is left after ``drain_s``.

    Args:
        run_dir: Of the cluster.
        http_replicas: How many there are; of one that has died nothing is heard.
        drain_s: At most so long.
    """
    replace_text(run_dir / PHASE_FILE, Phase.DRAINING.name)
    until = time.monotonic() + drain_s
    while time.monotonic() < until:
        left = _requests_left(run_dir)
        if len(left) >= http_replicas and not any(left):
            break
        time.sleep(PHASE_LOOK_S)
    replace_text(run_dir / PHASE_FILE, Phase.STOPPING.name)
    time.sleep(ENDED_AFTER_S)


async def follow_phase(run_dir: Path, name: str, load: SharedLoad) -> None:
    """In an HTTP replica, for ever: take over the phase, and say what is left.

    Args:
        run_dir: Of the cluster; on another machine nobody writes there.
        name: Of this replica, among those of this machine.
        load: Of this replica.
    """
    while True:
        await asyncio.sleep(PHASE_LOOK_S)
        with suppress(OSError, KeyError):
            load.phase = Phase[(run_dir / PHASE_FILE).read_text(encoding="ascii")]
            replace_text(run_dir / f"{name}.left", str(load.requests()))


def _requests_left(run_dir: Path) -> list[int]:
    """Requests that each HTTP replica still has, of those that have said so."""
    found = []
    for path in run_dir.glob("*.left"):
        with suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")))
    return found
