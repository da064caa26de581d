"""What the registry says, in the memory of one process: answers never wait for a database.

A change on this machine is counted in memory that all processes share. Whoever finds the count
moved on reads the registry anew before it answers; changes by others (another machine, a tool on
the database) are found by reading it every POLL_S. So what is answered is older than the last
change acknowledged here by nothing, and than any other change by POLL_S and one reading.

While the registry cannot be read, answers go on from what is known, with two exceptions that would
be guesses: a change that was acknowledged here and never read, and a name that is not known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

from adapters.errors import BaseMismatch, RegistryUnavailable
from adapters.registry.naming import name_not_found

if TYPE_CHECKING:
    from adapters.registry.records import AdapterRecord

POLL_S: Final = 0.5  # so that with its reading a change of others is known within a second
_FIX: Final = "Try again in a few seconds; if it stays so, the operator must look at it."

logger = logging.getLogger(__name__)


class Readable(Protocol):
    """What is needed of a registry."""

    def records(self) -> Mapping[str, AdapterRecord]: ...


class Names:
    """The records of one registry as this process last read them.

    ``refresh`` waits for the database and belongs in a thread; nothing else here waits.

    Args:
        registry: Read by ``refresh`` only.
        changes: How many changes were acknowledged on this machine; never less than before.
        base_digest: Of the base that is served; adapters checked on another are refused. Empty:
            none are.
    """

    def __init__(
        self, registry: Readable, changes: Callable[[], int], *, base_digest: str = ""
    ) -> None:
        self.base_digest = base_digest
        self.records: Mapping[str, AdapterRecord] = {}
        self._found: Mapping[str, AdapterRecord] = {}  # by name and by alias
        self.read_at = time.monotonic()  # when the last reading that succeeded began
        self.is_down = False  # the last reading failed
        self._registry = registry
        self._changes = changes
        self._seen = -1  # changes that the last reading covers
        self._lock = threading.Lock()

    @property
    def is_current(self) -> bool:
        """Whether every change that was acknowledged on this machine has been read."""
        return self._seen >= self._changes()

    def covers(self, changes: int) -> bool:
        """Whether the first ``changes`` of this machine have been read."""
        return self._seen >= changes

    def refresh(self) -> bool:
        """Read the registry, if need be waiting for it as long as its own bounds allow.

        Returns:
            Whether it could be read; when not, what was known stays and ``is_down`` says so.
        """
        with self._lock:
            began, changes = time.monotonic(), self._changes()  # before: others may change it
            try:
                records = self._registry.records()
            except Exception as error:  # noqa: BLE001  # whatever it is, the next reading tries again
                if not self.is_down:
                    logger.error(
                        "The registry cannot be read; answers go on from what is known: %s", error
                    )
                self.is_down = True
                return False
            if self.is_down:
                logger.warning("The registry can be read again, after %.1f s", began - self.read_at)
            if records is not self.records:
                others = {alias: one for one in records.values() for alias in one.aliases}
                self._found = {**others, **records}
            self.records, self._seen, self.read_at = records, changes, began
            self.is_down = False
            return True

    def resolve(self, name: str) -> AdapterRecord:
        """The record of ``name``, or of the name that it is an alias of; from memory.

        Raises:
            AdapterNotFound: There is none.
            RegistryUnavailable: Whether there is one, or which, cannot be known now.
        """
        record = self._found.get(name)
        if self.is_down and (record is None or not self.is_current):
            raise RegistryUnavailable(
                "The registry cannot be read now, and without it this adapter is not known.",
                found=f"last read {time.monotonic() - self.read_at:.0f} s ago",
                expected="a database that answers",
                fix=_FIX,
            )
        if record is None:
            raise name_not_found(name)
        return record

    def knows(self, name: str) -> bool:
        """Whether it is the name of an adapter, or an alias."""
        return name in self._found

    def check_fits(self, record: AdapterRecord) -> None:
        """Refuse an adapter that was checked on another base than the one that is served.

        Raises:
            BaseMismatch: It was.
        """
        if record.fits(self.base_digest):
            return
        raise BaseMismatch(
            f"The adapter {record.name} was registered for another base than the one served here.",
            found=f"base {record.base_digest or 'unknown'}",
            expected=f"base {self.base_digest}",
            fix="Register it again on this base, or start the server with the base it was made "
            "for.",
        )

    def listed(self, *, fitting: bool = False, prefix: str = "") -> list[AdapterRecord]:
        """Records by name.

        Args:
            fitting: Leave out those of other bases.
            prefix: Of the names.
        """
        return [
            one
            for one in self.records.values()
            if one.name.startswith(prefix) and (not fitting or one.fits(self.base_digest))
        ]

    def versions(self) -> set[str]:
        """Every version that some name is on, or gives a share of its traffic."""
        return {version for record in self.records.values() for version in record.versions()}

    def pinned_versions(self) -> tuple[str, ...]:
        """Versions that pinned names are on and that fit the base, in the order of names, each with
        its canary's."""
        pinned = [one for one in self.listed(fitting=True) if one.pinned]
        answering = (
            one
            for record in pinned
            for one in (record, *(() if record.canary is None else (record.canary.record,)))
            if one.fits(self.base_digest)
        )
        return tuple(dict.fromkeys(one.version for one in answering))
