"""Moves of a name between versions that it was on: its history, and rolling back.

Beside `Registry`, which puts names on new content. A move is one transaction, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime

import sqlalchemy as sa

from adapters.errors import AdapterNotFound, NameMoved, VersionGone
from adapters.registry.history import HistoryEntry, chosen_entry, entries_of
from adapters.registry.records import AdapterRecord, read_one, write
from adapters.registry.store import Store

Opened = Callable[[], AbstractContextManager[sa.Connection]]


class Moves:
    """See the module. Part of a `Registry`, and as safe in threads and processes.

    Args:
        reading, transaction: Open a connection of the registry, to read or to write.
        store: Where the bytes are.
    """

    def __init__(self, reading: Opened, transaction: Opened, store: Store) -> None:
        self._reading = reading
        self._transaction = transaction
        self._store = store

    def history(self, name: str) -> list[HistoryEntry]:
        """Every time that ``name`` was put on a version, the newest first.

        Raises:
            AdapterNotFound: There is no such name.
        """
        with self._reading() as connection:
            present_record(connection, name)
            return entries_of(connection, name)

    def rollback(
        self, name: str, version: str | None, checked: Callable[[str], AdapterRecord]
    ) -> tuple[AdapterRecord, AdapterRecord]:
        """Put ``name`` back on a version that it was on, in one transaction.

        Its pin stays. Rolling back once more goes further back, never to what was rolled back from.

        Args:
            name: Of the adapter.
            version: Or its first digits, six at least; None: the one before.
            checked: The record of a version's bytes, as ``Registry.staged`` checks them.

        Returns:
            The record of the name now, and that of before. The move is durable.

        Raises:
            AdapterNotFound: There is no such name.
            VersionNotFound: It was never on this version, or on none before.
            VersionGone: The bytes are not kept any more; nothing has changed.
            AlreadyCurrent: It is on this version.
            NameMoved: Somebody else put it on another version meanwhile.
            AdapterError: Whatever is wrong with the bytes.
        """
        with self._reading() as connection:
            before = present_record(connection, name)
            entry = chosen_entry(name, entries_of(connection, name), before.version, version)
        self.hold_bytes(name, entry.version)
        found = checked(entry.version)
        with self._transaction() as connection:
            present = present_record(connection, name)
            if present.version != before.version:
                raise NameMoved(
                    f"{name} was put on another version meanwhile.",
                    found=present.version,
                    expected=before.version,
                    fix="Look at its history, and say which version it shall be on.",
                )
            self.hold_bytes(name, entry.version)  # the collector may have come between
            record = replace(
                found,
                name=name,
                source=entry.source,
                pinned=present.pinned,
                created=datetime.now(UTC),
            )
            write(connection, record, update=True, act="rolled_back", restores=entry.number)
            if self._store.has(present.version):
                self._store.touch(present.version)  # the grace of what it was on starts now
        return record, present

    def hold_bytes(self, name: str, version: str) -> None:
        """Start the grace of a version anew, so that the collector leaves its bytes alone.

        Raises:
            VersionGone: They are not there.
        """
        try:
            self._store.touch(version)
        except (AdapterNotFound, FileNotFoundError):
            raise VersionGone(
                f"The bytes of this version of {name} are gone.",
                found=version,
                expected="a version whose bytes are kept, as the history of the name says",
                fix="Register it again, or raise kept_versions for the next time.",
            ) from None


def present_record(connection: sa.Connection, name: str) -> AdapterRecord:
    """The record of a name, as this transaction sees it.

    Raises:
        AdapterNotFound: There is none.
    """
    record = read_one(connection, name)
    if record is None:
        raise name_not_found(name)
    return record


def name_not_found(name: str) -> AdapterNotFound:
    """The error for a name that is not there."""
    return AdapterNotFound(
        f"There is no adapter {name[:80]}.",
        found=name[:80],
        expected="a registered name",
        fix="GET /v1/models lists the names.",
    )
