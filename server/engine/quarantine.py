"""Which adapter versions have failed so often that they are not tried for a while.

Pure book-keeping: the caller says what happened and what time it is. A version is quarantined after
a number of failures in a row, none of them long after the one before; a success in between starts
the count anew, so an input that one version cannot take does not shut out all the others. When the
time is over the version is on probation: its next failure quarantines it again, for twice as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

WINDOW_S: Final = 60.0  # failures further apart are not in a row
LONGEST_S: Final = 3600.0
REMEMBERED: Final = 4096  # versions with failures; beyond it the oldest is forgotten


@dataclass(slots=True)
class _Record:
    failures: int = 0
    last_at: float = 0.0
    reason: str = ""
    times: int = 0  # quarantined so far
    until: float | None = None


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """Why a version is not tried, and for how long yet."""

    left_s: float
    reason: str


class Quarantine:
    """See the module.

    Args:
        failures: In a row.
        seconds: Of the first quarantine; each further one is twice as long, up to an hour.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures = failures
        self.seconds = seconds
        self.total = 0  # quarantines so far
        self._records: dict[str, _Record] = {}

    def entry(self, version: str, now: float) -> QuarantineEntry | None:
        """Whether ``version`` is quarantined at ``now``."""
        record = self._records.get(version)
        if record is None or record.until is None:
            return None
        if record.until <= now:
            record.until = None  # on probation
            record.failures = self.failures - 1
            record.last_at = now
            return None
        return QuarantineEntry(record.until - now, record.reason)

    def failed(self, version: str, reason: str, now: float) -> bool:
        """Note a failure of the version's own; True if it is quarantined by it."""
        if version not in self._records and len(self._records) >= REMEMBERED:
            del self._records[next(iter(self._records))]
        record = self._records.setdefault(version, _Record())
        if record.until is not None:
            return False  # of a request that was under way
        if now - record.last_at > WINDOW_S:
            record.failures = 0
        record.failures += 1
        record.last_at, record.reason = now, reason
        if record.failures < self.failures:
            return False
        record.until = now + min(LONGEST_S, self.seconds * 2.0**record.times)
        record.times += 1
        record.failures = 0
        self.total += 1
        return True

    def succeeded(self, version: str) -> None:
        """Note an answer of the version: what went wrong before is forgiven."""
        record = self._records.get(version)
        if record is not None and record.until is None:
            del self._records[version]

    def release(self, version: str) -> bool:
        """Forget what a version did; False if it was not quarantined."""
        record = self._records.pop(version, None)
        return record is not None and record.until is not None

    def entries(self, now: float) -> Mapping[str, QuarantineEntry]:
        """All versions that are quarantined at ``now``."""
        found = {version: self.entry(version, now) for version in list(self._records)}
        return {version: one for version, one in found.items() if one is not None}
