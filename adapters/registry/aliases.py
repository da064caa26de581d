"""Other names for adapters: an alias points to a name, never to another alias.

An alias is no adapter: it has no version, no pin and no history. Requests for it are requests for
the name that it points to, so that it moves from one adapter to another in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import sqlalchemy as sa

from adapters.errors import (
    AdapterAliased,
    AdapterExists,
    AdapterNotFound,
    AliasOfAlias,
    AliasToItself,
)
from adapters.registry.naming import check_name, name_not_found
from adapters.registry.records import AdapterRecord, count_change, read_one
from adapters.registry.tables import ALIASES


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
        if alias == name:
            raise AliasToItself(
                f"{alias} cannot be an alias of itself.",
                found=f"{alias} -> {name}",
                expected="the name of an adapter",
            )
        with self._transaction() as connection:
            if (further := _pointed_to(connection, name)) is not None:
                raise AliasOfAlias(
                    f"{name} is an alias itself.",
                    found=f"{alias} -> {name} -> {further}",
                    expected="the name of an adapter",
                    fix=f"Point it to {further}.",
                )
            if read_one(connection, alias) is not None:
                raise AdapterExists(
                    f"{alias} is the name of an adapter.",
                    found=alias,
                    expected="a name that is free, or an alias",
                    fix="Remove the adapter, or choose another alias.",
                )
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
        raise AdapterAliased(
            f"Aliases point to {record.name}.",
            found=", ".join(record.aliases[:8]),
            expected="no alias of a name that goes",
            fix="Remove them, or point them to another adapter.",
        )


def _pointed_to(connection: sa.Connection, alias: str) -> str | None:
    query = sa.select(ALIASES.c.name).where(ALIASES.c.alias == alias)
    name = connection.execute(query).scalar_one_or_none()
    return None if name is None else str(name)
