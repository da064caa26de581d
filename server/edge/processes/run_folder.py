"""The folder of the running processes' state: in memory where there is room, locked while in use.

Metrics are in sparse files that are mapped into memory: on a disk that is full, the kernel ends
whoever touches a new page of one. Nothing in this folder needs to outlive the server, so it is in
memory, and its place in the data folder is a link to it. A link says nothing about whose the target
is, since data folders are copied: none is followed to delete anything. What servers that were
killed left in memory is told by its lock, which nobody holds any more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

MEMORY_DIR: Final = Path("/dev/shm")
RUN_DIR_PREFIX: Final = "hira-run-"
_UNLOCKED_PREFIX: Final = "hira-new-"  # until its lock is taken: nobody takes it for left behind
OWNER_LOCK_FILE: Final = "owner.lock"

logger = logging.getLogger(__name__)


class RunFolder:
    """See the module; made by ``run_folder``.

    Args:
        place: Where processes look for it.
        need_bytes: That it may come to hold.
    """

    def __init__(self, place: Path, need_bytes: int) -> None:
        self._place = place
        self._need_bytes = need_bytes
        self._make()

    def _make(self) -> None:
        _clear(self._place)
        made = _in_memory(self._need_bytes)
        if made is None:
            self._place.mkdir(mode=0o700)
            made = self._place, _locked(self._place)
        else:
            self._place.symlink_to(made[0])
        self._folder, self._lock = made

    def restore(self) -> bool:
        """Make it anew if it is gone, as when the system clears a user's memory files at logout.

        Returns:
            Whether it was gone, and all that was in it with it.
        """
        try:
            if os.path.samestat(os.stat(self._place / OWNER_LOCK_FILE), os.fstat(self._lock)):
                return False
        except OSError:
            pass  # gone, or not to be reached
        os.close(self._lock)
        self._make()
        logger.error(
            "The run folder %s was gone; it is made anew, what was counted is lost", self._folder
        )
        return True

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        _clear(self._place)
        os.close(self._lock)


@contextmanager
def run_folder(place: Path, need_bytes: int) -> Iterator[RunFolder]:
    """An empty folder at ``place`` for as long as the block runs.

    Args:
        place: A folder, or a link to one, of an earlier server is replaced.
        need_bytes: Where memory files have less room, it is on the disk.
    """
    sweep()
    folder = RunFolder(place, need_bytes)
    try:
        yield folder
    finally:
        folder.remove()


def sweep() -> None:
    """Delete what this user's servers that were killed left in memory."""
    for folder in MEMORY_DIR.glob(f"{RUN_DIR_PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(folder / OWNER_LOCK_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its server lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _clear(place: Path) -> None:
    """Nothing at ``place``; what a link points at stays."""
    if place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)


def _in_memory(need_bytes: int) -> tuple[Path, int] | None:
    """A locked folder in memory, and the lock; None where there is no place or no room for it."""
    try:
        room = os.statvfs(MEMORY_DIR)
        free_bytes = room.f_bavail * room.f_frsize
        if free_bytes < need_bytes:
            logger.warning(
                "%s has %d MB free and the metrics may take %d MB: they are kept on the disk "
                "(more room: docker run --shm-size)",
                MEMORY_DIR, free_bytes // 1_000_000, -(-need_bytes // 1_000_000),
            )  # fmt: skip
            return None
        made = Path(tempfile.mkdtemp(prefix=_UNLOCKED_PREFIX, dir=MEMORY_DIR))
    except OSError:  # no such folder, or not for us
        return None
    try:
        lock = _locked(made)
        folder = MEMORY_DIR / made.name.replace(_UNLOCKED_PREFIX, RUN_DIR_PREFIX, 1)
        made.rename(folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        return None
    return folder, lock


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it, and its copies in forks, are closed."""
    lock = os.open(folder / OWNER_LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock
