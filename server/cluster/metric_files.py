"""Counts of all replicas on one node, in one folder, so that any of them answers for the node."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from server.metrics import FOLDER_VARIABLE, count_as

REPLICAS_MAX: Final = 256  # of one kind, on one node
_held: list[int] = []  # locks, for as long as the process lives


def count_on_node(kind: str, folder: Path) -> str:
    """From now on count in files of this node that no living replica uses, and return their name.

    A replica that comes after one that died takes its files over, so no counter goes back and no
    file is left behind. Nothing is done where the folder was not named before the start.

    Args:
        kind: ``http`` or ``engine``.
        folder: Of this node; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(REPLICAS_MAX):
        lock = os.open(folder / f"{kind}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _held.append(lock)
        if FOLDER_VARIABLE in os.environ:
            count_as(f"{kind}-{number}")
        return f"{kind}-{number}"
    raise RuntimeError(f"more than {REPLICAS_MAX} {kind} replicas count in {folder}")


def names_in_use(kind: str, folder: Path) -> list[str]:
    """The names of this node that living replicas count under.

    Args:
        kind: ``http`` or ``engine``.
        folder: As of `count_on_node`.
    """
    return sorted(one.stem for one in folder.glob(f"{kind}-*.lock") if is_held(one))


def is_held(lock: Path) -> bool:
    """Whether a living process holds a lock; a file that is not there is held by nobody."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the handle too
        return False
    finally:
        os.close(handle)
