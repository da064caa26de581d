"""What each name was on, in order: the statements, and which old versions keep their bytes.

A row is written in the transaction that moves the name, so the history never says more or less than
what happened. It is bounded: ``ENTRIES_MAX`` rows of a name, the oldest go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from adapters.errors import AlreadyCurrent, VersionNotFound
from adapters.registry.tables import ADAPTERS, NAME_VERSIONS

ENTRIES_MAX: Final = 100  # of one name
PREFIX_MIN: Final = 6  # hexadecimal digits that may stand for a version

# By what a name came to a version.
Act = Literal["registered", "replaced", "applied", "rolled_back", "promoted"]


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One time that a name was put on a version.

    Args:
        number: Counts from 1 for each name, without gaps.
        version: Digest of the content.
        act: By what it came there.
        acted: When, UTC.
        source: Where the adapter came from.
        tensor_bytes: Of its tensors.
        restores: Of a rollback, the number of the entry whose version came back.
    """

    number: int
    version: str
    act: Act
    acted: datetime
    source: str
    tensor_bytes: int
    restores: int | None = None


def note_move(connection: sa.Connection, name: str, moved: HistoryEntry) -> None:
    """Write down that ``name`` is on this version now; nothing where it was before.

    Args:
        connection: Of the transaction that moves it.
        name: Of the adapter.
        moved: How it came there; its number is not looked at.
    """
    table = NAME_VERSIONS.c
    last = connection.execute(
        sa.select(table.number, table.version)
        .where(table.name == name)
        .order_by(table.number.desc())
        .limit(1)
    ).first()
    if last is not None and last.version == moved.version:
        return
    number = 1 if last is None else int(last.number) + 1
    values = {
        "name": name,
        "number": number,
        "version": moved.version,
        "act": moved.act,
        "acted": moved.acted.isoformat(),
        "source": moved.source,
        "tensor_bytes": moved.tensor_bytes,
        "restores": moved.restores,
    }
    connection.execute(sa.insert(NAME_VERSIONS), values)
    connection.execute(
        sa.delete(NAME_VERSIONS).where(table.name == name, table.number <= number - ENTRIES_MAX)
    )


def forget_name(connection: sa.Connection, name: str) -> None:
    """The history of a name ends with the name."""
    connection.execute(sa.delete(NAME_VERSIONS).where(NAME_VERSIONS.c.name == name))


def entries_of(connection: sa.Connection, name: str) -> list[HistoryEntry]:
    """The history of a name, the newest first."""
    query = (
        sa.select(NAME_VERSIONS)
        .where(NAME_VERSIONS.c.name == name)
        .order_by(NAME_VERSIONS.c.number.desc())
    )
    return [_from_history_row(row) for row in connection.execute(query)]


def kept_versions(connection: sa.Connection, most: int, of_version: str | None = None) -> set[str]:
    """Old versions whose bytes are kept: of each name the ``most`` latest that it is not on.

    Args:
        connection: To read with.
        most: Of each name.
        of_version: Look at the names alone that were on this version; None: at all.
    """
    if most < 1:
        return set()
    table = NAME_VERSIONS.c
    query = (
        sa.select(table.name, table.version, ADAPTERS.c.version.label("current"))
        .join(ADAPTERS, ADAPTERS.c.name == table.name)
        .order_by(table.name, table.number.desc())
    )
    if of_version is not None:
        names = sa.select(table.name).where(table.version == of_version)
        query = query.where(table.name.in_(names))
    kept: dict[str, dict[str, None]] = {}
    for name, version, current in connection.execute(query):
        own = kept.setdefault(name, {})
        if version != current and len(own) < most:
            own[version] = None
    return {version for own in kept.values() for version in own}


def oldest_first(connection: sa.Connection) -> list[str]:
    """Every version that some name was on, by when a name was last put on it."""
    table = NAME_VERSIONS.c
    latest = sa.func.max(table.acted)
    query = sa.select(table.version).group_by(table.version).order_by(latest)
    return [str(version) for (version,) in connection.execute(query)]


def chosen_entry(
    name: str, entries: Sequence[HistoryEntry], current: str, version: str | None
) -> HistoryEntry:
    """The entry that a rollback goes to.

    Args:
        name: For errors.
        entries: Of the name, the newest first.
        current: The version that it is on.
        version: Or the first digits of one; None: the one before. After a rollback that is the
            one before the entry that came back, so that rolling back again goes further back and
            never to what was rolled back from.

    Raises:
        VersionNotFound: The name was never on it, or on none before, or the digits fit several.
        AlreadyCurrent: The name is on it.
    """
    if version is None:
        return _entry_before(name, entries, current)
    fitting = {one.version: one for one in reversed(entries) if one.version.startswith(version)}
    if version not in fitting and (len(version) < PREFIX_MIN or len(fitting) != 1):
        raise VersionNotFound(
            f"{name} was never on this version."
            if not fitting
            else "These digits do not stand for one version.",
            found=version[:80],
            expected=_some_of(one.version for one in entries),
            fix="Name one that the history has.",
        )
    entry = fitting.get(version) or next(iter(fitting.values()))
    if entry.version == current:
        raise AlreadyCurrent(
            f"{name} is on this version already.",
            found=current,
            expected=_some_of(one.version for one in entries if one.version != current),
        )
    return entry


def was_rolled_back_from(entries: Sequence[HistoryEntry], version: str) -> bool:
    """Whether the last that happened to a name was a rollback by which it left ``version``.

    Args:
        entries: Of the name, the newest first.
        version: That it may have left.
    """
    if not entries or entries[0].restores is None:
        return False
    return any(one.version == version and one.number > entries[0].restores for one in entries)


def _entry_before(name: str, entries: Sequence[HistoryEntry], current: str) -> HistoryEntry:
    before = entries[0].number if entries else 0
    if entries and entries[0].restores is not None:
        before = entries[0].restores
    for one in entries:
        if one.number < before and one.version != current:
            return one
    raise VersionNotFound(
        f"{name} was on no version before this one.",
        found=current,
        expected=_some_of(one.version for one in entries if one.version != current),
        fix="Name a version that the history has, or register one with replace.",
    )


def _some_of(versions: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(versions))
    more = f" and {len(distinct) - 5} more" if len(distinct) > 5 else ""
    return "one of " + ", ".join(distinct[:5]) + more if distinct else "another version"


def _from_history_row(row: Any) -> HistoryEntry:
    return HistoryEntry(
        number=row.number,
        version=row.version,
        act=row.act,
        acted=datetime.fromisoformat(row.acted),
        source=row.source,
        tensor_bytes=row.tensor_bytes,
        restores=row.restores,
    )
