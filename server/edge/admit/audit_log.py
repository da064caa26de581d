"""The audit log: who changed what, when, from where, and how it ended; a JSON object a line.

Two lines for each call of the administration that may change something: ``began`` is on the disk
before anything is done, ``ended`` before the answer goes out. So a call that is not in the log has
not been made, and one without an end is one whose server died. All HTTP processes write to one
file, and turn it over when it is large; a lock of the kernel's has them take turns.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from server.settings import Settings

AUDIT_FILE: Final = "audit.jsonl"
AUDIT_FILES: Final = 4  # the present one and those before it, within the bound together


class AuditLog:
    """See the module. Not for the event loop: it waits for the disk.

    Args:
        place: A file, or None for standard output.
        most_bytes: Of all files together.
    """

    def __init__(self, place: Path | None, most_bytes: int) -> None:
        self.place = place
        self.most_bytes = most_bytes

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line; when this returns it is on the disk.

        Raises:
            OSError: It is not, and nothing of it is.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if self.place is None:
            sys.stdout.write(line.decode())
            sys.stdout.flush()
            return
        with self._turn(self.place):
            if self._size() + len(line) > self.most_bytes // AUDIT_FILES:
                self._turn_over(self.place)
            handle = os.open(self.place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                before = os.fstat(handle).st_size
                try:
                    written = os.write(handle, line)
                    if written < len(line):
                        raise OSError(28, "No space left for the whole line")
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, before)
                    raise
            finally:
                os.close(handle)

    def _size(self) -> int:
        assert self.place is not None
        return self.place.stat().st_size if self.place.exists() else 0

    def _turn_over(self, place: Path) -> None:
        """``audit.jsonl`` becomes ``audit.jsonl.1``, that ``.2``; the oldest goes."""
        for number in range(AUDIT_FILES - 1, 0, -1):
            older = place.with_name(f"{place.name}.{number}")
            newer = place if number == 1 else place.with_name(f"{place.name}.{number - 1}")
            if newer.exists():
                os.replace(newer, older)

    @contextmanager
    def _turn(self, place: Path) -> Iterator[None]:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the handle too
            os.close(handle)


def audit_log_of(settings: Settings) -> AuditLog | None:
    """The log that the settings ask for; None: none."""
    match settings.audit_log:
        case "off":
            return None
        case "stdout":
            place = None
        case None:
            place = settings.data_dir / AUDIT_FILE
        case path:
            place = Path(path)
    return AuditLog(place, int(settings.audit_bytes))


def audit_time() -> str:
    """Now, as the log has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
