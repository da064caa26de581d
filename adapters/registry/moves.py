"""Moves of a name between versions: its history, rolling back, and trying one on a share of the
traffic before the name moves (a canary).

Beside `Registry`, which puts names on new content. A move is one transaction, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import sqlalchemy as sa

from adapters.errors import (
    AdapterNotFound,
    AlreadyCurrent,
    BaseMismatch,
    CanaryNotFound,
    InvalidShare,
    NameMoved,
    OtherTask,
    VersionGone,
    VersionNotFound,
)
from adapters.registry.adapter_bytes import AdapterBytes
from adapters.registry.held_bytes import HeldBytes, Needed, Opened
from adapters.registry.history import HistoryEntry, chosen_entry, entries_of
from adapters.registry.naming import name_not_found
from adapters.registry.records import (
    AdapterRecord,
    Canary,
    count_change,
    delete_canary,
    read_one,
    write,
    write_canary,
)

T = TypeVar("T")


class Moves:
    """See the module. Part of a `Registry`, and as safe in threads and processes.

    Args:
        reading: Opens a connection of the registry.
        held: Makes changes.
        store: Where the bytes are.
    """

    def __init__(self, reading: Opened, held: HeldBytes, store: AdapterBytes) -> None:
        self._reading = reading
        self._held = held
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

        Its pin stays and its canary ends. Rolling back once more goes further back, never to what
        was rolled back from.

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

        def move(connection: sa.Connection) -> tuple[AdapterRecord, AdapterRecord]:
            present = present_record(connection, name)
            if present.version != before.version:
                raise NameMoved(
                    f"{name} was put on another version meanwhile.",
                    found=present.version,
                    expected=before.version,
                    fix="Look at its history, and say which version it shall be on.",
                )
            record = replace(
                found,
                name=name,
                source=entry.source,
                pinned=present.pinned,
                created=datetime.now(UTC),
            )
            write(connection, record, update=True, act="rolled_back", restores=entry.number)
            return present_record(connection, name), present  # with its aliases

        return self._changing(
            lambda connection: Needed(
                (entry.version,), present_record(connection, name).versions()
            ),
            move,
            name,
        )

    def start_canary(
        self,
        name: str,
        version: str | None,
        share: float,
        checked: Callable[[str], AdapterRecord],
    ) -> AdapterRecord:
        """Give a version a share of the requests for ``name``, or its canary another share.

        Args:
            name: Of the adapter.
            version: Whose bytes are in the store: staged, or in the history of the name, then its
                first digits do. None: the present canary's.
            share: Percent of the requests, 0 to 100.
            checked: As for ``rollback``.

        Returns:
            The record of the name, with its canary.

        Raises:
            InvalidShare: It is below 0 or above 100.
            AdapterNotFound: There is no such name.
            CanaryNotFound: No version is named, and there is no canary.
            VersionNotFound: Nobody knows this version.
            VersionGone: Its bytes are not kept any more.
            AlreadyCurrent: The name is on it.
            OtherTask: It does another task than the name.
            AdapterError: Whatever is wrong with its bytes.
        """
        if not 0.0 <= share <= 100.0:
            raise InvalidShare(
                "This is no share of the traffic.",
                found=f"{share:g} %",
                expected="0 to 100 %",
                fix="To move all of it, promote the canary.",
            )
        with self._reading() as connection:
            before = present_record(connection, name)
            entries = entries_of(connection, name)
        if version is None:
            version = _canary_of(before).record.version
        wanted, source = self._known_version(before, entries, version)
        self.hold_bytes(name, wanted)
        found = checked(wanted)
        if found.task != before.task:
            raise OtherTask(
                f"{name} answers another task than this version does.",
                found=found.task,
                expected=before.task,
                fix="Register it under a name of its own.",
            )

        def share_out(connection: sa.Connection) -> AdapterRecord:
            present = present_record(connection, name)
            if present.version == wanted:
                raise _is_current(name, wanted)
            if present.task != found.task:
                raise NameMoved(f"{name} does {present.task} now.", found=present.version)
            running = present.canary
            kept = running is not None and running.record.version == wanted
            started = running.record.created if running and kept else datetime.now(UTC)
            came_from = running.record.source if running and kept else source
            record = replace(found, name=name, source=came_from, pinned=False, created=started)
            write_canary(connection, Canary(record, float(share)))
            return present_record(connection, name)

        return self._changing(
            lambda connection: Needed((wanted,), _canary_versions(connection, name)),
            share_out,
            name,
        )

    def promote(self, name: str) -> tuple[AdapterRecord, AdapterRecord]:
        """Put ``name`` on its canary's version, which ends the canary.

        Returns:
            The record of the name now, and that of before. The move is durable.

        Raises:
            AdapterNotFound: There is no such name.
            CanaryNotFound: It has no canary.
            VersionGone: Its bytes are gone.
            BaseMismatch: It was checked on another base than what the name is on.
        """

        def move(connection: sa.Connection) -> tuple[AdapterRecord, AdapterRecord]:
            present = present_record(connection, name)
            canary = _canary_of(present).record
            if canary.base_digest != present.base_digest:
                raise BaseMismatch(
                    f"The canary of {name} was checked on another base than the name.",
                    found=f"base {canary.base_digest or 'unknown'}",
                    expected=f"base {present.base_digest or 'unknown'}",
                    fix="Start the canary again on this base.",
                )
            record = replace(canary, pinned=present.pinned, created=datetime.now(UTC))
            write(connection, record, update=True, act="promoted")
            return present_record(connection, name), present

        def needed(connection: sa.Connection) -> Needed:
            present = present_record(connection, name)
            return Needed((_canary_of(present).record.version,), (present.version,))

        return self._changing(needed, move, name)

    def abort(self, name: str) -> tuple[AdapterRecord, str]:
        """End the canary of ``name``: all requests are answered by the version that it is on.

        Returns:
            The record of the name, and the version that had a share.

        Raises:
            AdapterNotFound: There is no such name.
            CanaryNotFound: It has no canary.
        """

        def end(connection: sa.Connection) -> tuple[AdapterRecord, str]:
            version = _canary_of(present_record(connection, name)).record.version
            delete_canary(connection, name)
            count_change(connection)
            return present_record(connection, name), version

        return self._changing(
            lambda connection: Needed(left=_canary_versions(connection, name)), end, name
        )

    def _known_version(
        self, present: AdapterRecord, entries: Sequence[HistoryEntry], version: str
    ) -> tuple[str, str]:
        """The whole version that is meant, and where it came from.

        Raises:
            AlreadyCurrent, VersionNotFound.
        """
        if version == present.version:
            raise _is_current(present.name, version)
        if present.canary is not None and present.canary.record.version == version:
            return version, present.canary.record.source
        try:
            entry = chosen_entry(present.name, entries, present.version, version)
        except VersionNotFound:
            if not self._store.has(version):
                raise
            return version, "staged"
        return entry.version, entry.source

    def _changing(
        self,
        needed: Callable[[sa.Connection], Needed],
        work: Callable[[sa.Connection], T],
        name: str,
    ) -> T:
        return self._held.change(needed, work, partial(self.hold_bytes, name))

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


def _canary_versions(connection: sa.Connection, name: str) -> tuple[str, ...]:
    """The version of a name's canary, if it has one."""
    canary = present_record(connection, name).canary
    return () if canary is None else (canary.record.version,)


def _canary_of(record: AdapterRecord) -> Canary:
    if record.canary is None:
        raise CanaryNotFound(
            f"{record.name} has no canary.",
            found="all requests on one version",
            expected="a canary",
            fix="Start one with a version and a share.",
        )
    return record.canary


def _is_current(name: str, version: str) -> AlreadyCurrent:
    return AlreadyCurrent(
        f"{name} is on this version already.", found=version, expected="another version"
    )


def present_record(connection: sa.Connection, name: str) -> AdapterRecord:
    """The record of a name, as this transaction sees it.

    Raises:
        AdapterNotFound: There is none.
    """
    record = read_one(connection, name)
    if record is None:
        raise name_not_found(name)
    return record
