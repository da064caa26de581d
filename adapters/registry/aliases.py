"""Other names for adapters: an alias points to a name, never to another alias.

An alias is no adapter: it has no version, no pin and no history. Requests for it are requests for
the name that it points to, so that it moves from one adapter to another in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import sqlalchemy as sa

from adapters.errors import (
    AdapterAliased,
    AdapterError,
    AdapterExists,
    AdapterFaults,
    AdapterNotFound,
    AliasOfAlias,
    AliasToItself,
)
from adapters.registry.naming import NAME, check_name, name_not_found
from adapters.registry.records import AdapterRecord, Change, count_change, read_one
from adapters.registry.tables import ADAPTERS, ALIASES


class Aliases:
    """See the module. Part of a `Registry`, and as safe in threads and processes.

    Args:
        reading, transaction: Open a connection of the registry, to read or to write.
    """

    def __init__(
        self,
        reading: Callable[[], AbstractContextManager[sa.Connection]],
        transaction: Callable[[], AbstractContextManager[sa.Connection]],
    ) -> None:
        self._reading = reading
        self._transaction = transaction

    def all(self) -> dict[str, str]:
        """The name that each alias points to, in the order of aliases."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(ALIASES).order_by(ALIASES.c.alias))
            return {row.alias: row.name for row in rows}

    def set(self, alias: str, name: str) -> tuple[AdapterRecord, str | None]:
        """Point ``alias`` to ``name``, from wherever it points now.

        Returns:
            The record of the name, and where the alias pointed before; None: there was none.

        Raises:
            InvalidName: The alias is malformed.
            AliasToItself: They are the same.
            AliasOfAlias: ``name`` is an alias itself.
            AdapterExists: ``alias`` is the name of an adapter.
            AdapterNotFound: There is no adapter ``name``.
        """
        check_name(alias)
        with self._transaction() as connection:
            further = _pointed_to(connection, name)
            taken = [alias] if read_one(connection, alias) is not None else []
            _check_pointing(alias, name, taken, {} if further is None else {name: further})
            if read_one(connection, name) is None:
                raise name_not_found(name)
            before = _pointed_to(connection, alias)
            if before is None:
                connection.execute(sa.insert(ALIASES), {"alias": alias, "name": name})
            elif before != name:
                here = ALIASES.c.alias == alias
                connection.execute(sa.update(ALIASES).where(here), {"name": name})
            if before != name:
                count_change(connection)
            record = read_one(connection, name)
        assert record is not None
        return record, before

    def remove(self, alias: str) -> str:
        """Take ``alias`` away; returns where it pointed.

        Raises:
            AdapterNotFound: There is no such alias.
        """
        with self._transaction() as connection:
            name = _pointed_to(connection, alias)
            if name is None:
                raise AdapterNotFound(
                    f"There is no alias {alias[:80]}.",
                    found=alias[:80],
                    expected="an alias",
                    fix="GET /admin/aliases lists them.",
                )
            connection.execute(sa.delete(ALIASES).where(ALIASES.c.alias == alias))
            count_change(connection)
        return name


@dataclass(frozen=True, slots=True)
class AliasChange:
    """What applying a set does to one alias; ``name`` is None where it goes, ``before`` where it
    was not there."""

    alias: str
    name: str | None
    before: str | None

    @property
    def change(self) -> Change:
        """In a word."""
        if self.name is None:
            return "removed"
        if self.before is None:
            return "created"
        return "unchanged" if self.name == self.before else "replaced"


def plan_aliases(
    connection: sa.Connection,
    wanted: Collection[str],
    removed: Collection[str],
    aliases: Mapping[str, str] | None,
    *,
    dry_run: bool,
) -> list[AliasChange]:
    """Check the aliases that there will be beside the names that there will be, and set them.

    Args:
        connection: Of the transaction.
        wanted: Names that will be there.
        removed: Names that will not.
        aliases: All that there shall be; None: as they are.
        dry_run: Only check.

    Returns:
        One entry for every alias that is there before or afterwards; none where they stay.

    Raises:
        AdapterFaults: All that is wrong with them.
    """
    present = {row.alias: row.name for row in connection.execute(sa.select(ALIASES))}
    after = present if aliases is None else dict(aliases)
    names = set(connection.execute(sa.select(ADAPTERS.c.name)).scalars())
    names = (names | set(wanted)) - set(removed)
    faults: list[AdapterError] = []
    for alias, name in after.items():
        try:
            check_name(alias)
            _check_pointing(alias, name, names, after)
            if name in removed:
                raise _aliased(name, [alias])
            if name not in names:
                raise name_not_found(name)
        except AdapterError as error:
            faults.append(error)
    if faults:
        raise AdapterFaults(faults)
    if aliases is None:
        return []
    changes = [
        AliasChange(alias, after.get(alias), present.get(alias))
        for alias in sorted(present.keys() | after.keys())
    ]
    for one in changes:
        if dry_run or one.change == "unchanged":
            continue
        connection.execute(sa.delete(ALIASES).where(ALIASES.c.alias == one.alias))
        if one.name is not None:
            connection.execute(sa.insert(ALIASES), {"alias": one.alias, "name": one.name})
        count_change(connection)
    return changes


def _check_pointing(
    alias: str, name: str, names: Collection[str], aliases: Mapping[str, str]
) -> None:
    """Raise what is wrong with an alias of ``name`` beside these names and aliases."""
    if alias == name:
        raise AliasToItself(
            f"{alias} cannot be an alias of itself.",
            found=f"{alias} -> {name}",
            expected="the name of an adapter",
        )
    if name in aliases:
        raise AliasOfAlias(
            f"{name} is an alias itself.",
            found=f"{alias} -> {name} -> {aliases[name]}",
            expected="the name of an adapter",
            fix=f"Point it to {aliases[name]}.",
        )
    if alias in names:
        raise AdapterExists(
            f"{alias} is the name of an adapter.",
            found=alias,
            expected="a name that is free, or an alias",
            fix="Remove the adapter, or choose another alias.",
        )


def check_no_alias(connection: sa.Connection, name: str) -> None:
    """Raise AdapterExists when ``name`` is an alias, which no adapter may be registered under."""
    pointed = _pointed_to(connection, name)
    if pointed is not None:
        raise AdapterExists(
            f"{name} is an alias of {pointed}.",
            found=f"{name} -> {pointed}",
            expected="a name that is no alias",
            fix="Remove the alias, or choose another name.",
        )


def check_not_aliased(record: AdapterRecord) -> None:
    """Raise AdapterAliased when aliases point to a name that is to go."""
    if record.aliases:
        raise _aliased(record.name, record.aliases)


def _aliased(name: str, aliases: Sequence[str]) -> AdapterAliased:
    return AdapterAliased(
        f"Aliases point to {name}.",
        found=", ".join(aliases[:8]),
        expected="no alias of a name that goes",
        fix="Remove them, or point them to another adapter.",
    )


def _pointed_to(connection: sa.Connection, alias: str) -> str | None:
    if not NAME.fullmatch(alias):
        return None  # nor would every database take it
    query = sa.select(ALIASES.c.name).where(ALIASES.c.alias == alias)
    name = connection.execute(query).scalar_one_or_none()
    return None if name is None else str(name)
