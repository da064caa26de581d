"""How a cluster on one machine drains: its HTTP replicas refuse new requests, and finish what they
have, before Ray Serve takes them away.

They are told by a file of their run folder, for a handle of Ray Serve's reaches one of them and
not all; and each says in a file of its own how many requests it has. What a cluster that was killed
left in that folder says nothing to those after it: nobody holds the folder's lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from server.cluster.metric_files import is_held, names_in_use
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.worker_state import replace_text
from server.edge.processes.run_folder import OWNER_LOCK_FILE

logger = logging.getLogger(__name__)

PHASE_LOOK_S: Final = 0.1
ENDED_AFTER_S: Final = 1.0  # for requests that are ended, until their answers are out
PHASE_FILE: Final = "phase"


def drain(run_dir: Path, metrics_dir: Path, drain_s: float) -> None:
    """Have all HTTP replicas of this machine drain, and end what is left after ``drain_s``.

    Args:
        run_dir: Of the cluster; this process holds its lock.
        metrics_dir: Of the cluster: which of them live is told by their locks there.
        drain_s: At most so long.
    """
    replace_text(run_dir / PHASE_FILE, Phase.DRAINING.name)
    until = time.monotonic() + drain_s
    while time.monotonic() < until:
        if all(_requests_left(run_dir, one) == 0 for one in names_in_use("http", metrics_dir)):
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
    told = False
    while True:
        await asyncio.sleep(PHASE_LOOK_S)
        try:
            phase = Phase[(run_dir / PHASE_FILE).read_text(encoding="ascii")]
            if is_held(run_dir / OWNER_LOCK_FILE):
                load.phase = phase
                replace_text(run_dir / f"{name}.left", str(load.requests()))
        except FileNotFoundError:
            pass  # nobody has it drain
        except (OSError, KeyError, ValueError) as error:
            if not told:
                logger.warning(
                    "Whether this replica is to drain cannot be told, and is looked at again "
                    "every %s s: %r", PHASE_LOOK_S, error,
                )  # fmt: skip
            told = True


def _requests_left(run_dir: Path, name: str) -> int | None:
    """Requests that an HTTP replica still has; None where it has not said so."""
    with suppress(OSError, ValueError):
        return int((run_dir / f"{name}.left").read_text(encoding="ascii"))
    return None
