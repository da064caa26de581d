"""Changes of names that begin the grace of bytes first, and only then have all others wait.

To begin it may be calls of an object store, which take seconds when it is slow. So they are made
before the transaction, and the transaction goes through only if nobody has changed anything since
they were chosen: a collector that deletes moves the generation on as every change does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, TypeVar

import sqlalchemy as sa

from adapters.errors import AdapterNotFound
from adapters.registry.adapter_bytes import AdapterBytes
from adapters.registry.tables import STATE

CHANGE_TRIES: Final = 5  # while others keep changing names; after that they wait
T = TypeVar("T")
Opened = Callable[[], AbstractContextManager[sa.Connection]]


@dataclass(frozen=True, slots=True)
class Needed:
    """The versions whose grace a change begins.

    Args:
        named: A name will be on them: they must be there.
        left: A name was on them until now: requests that were admitted may need them.
    """

    named: Collection[str] = ()
    left: Collection[str] = ()


class HeldBytes:
    """See the module.

    Args:
        reading, transaction: Of the database.
        store: Where the bytes are.
    """

    def __init__(self, reading: Opened, transaction: Opened, store: AdapterBytes) -> None:
        self._reading = reading
        self._transaction = transaction
        self._store = store

    def change(
        self,
        needed: Callable[[sa.Connection], Needed],
        work: Callable[[sa.Connection], T],
        hold: Callable[[str], None] | None = None,
    ) -> T:
        """Do ``work`` in a transaction, with the grace of what it needs begun before.

        Args:
            needed: What the change needs as things are now; may refuse it.
            work: The change; it asks the store nothing.
            hold: Begins the grace of a version that is to be named, if not ``store.touch``.

        Raises:
            AdapterNotFound: The bytes of a version that is to be named are gone.
            AdapterError: Whatever ``needed``, ``work`` and ``hold`` raise. Nothing has changed.
        """
        hold = hold or self._store.touch
        for _ in range(CHANGE_TRIES):
            with self._reading() as connection:
                seen = _generation_now(connection)
                chosen = needed(connection)
            self._begin_grace(chosen, hold)
            with self._transaction() as connection:
                if _generation_now(connection) == seen:
                    return work(connection)
        with self._transaction() as connection:
            self._begin_grace(needed(connection), hold)
            return work(connection)

    def _begin_grace(self, chosen: Needed, hold: Callable[[str], None]) -> None:
        for version in chosen.named:
            hold(version)
        for version in chosen.left:
            if version not in chosen.named:
                self._leave(version)

    def _leave(self, version: str) -> None:
        try:
            self._store.touch(version)
        except (AdapterNotFound, FileNotFoundError):
            return  # its bytes are gone already


def _generation_now(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(STATE.c.generation)).scalar_one())
