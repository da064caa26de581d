"""Changes of names that begin the grace of bytes first, and only then have all others wait.

To begin it may be calls of an object store, which take seconds when it is slow. So they are made
before the transaction, and the transaction goes through only if nobody has changed anything since
they were chosen, and nobody is deleting what it names (`adapters.registry.removals`): a collector
that has deleted moves the generation on as every change does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, TypeVar

import sqlalchemy as sa

from adapters.errors import AdapterNotFound, StoreUnavailable
from adapters.registry.adapter_bytes import AdapterBytes
from adapters.registry.removals import being_removed
from adapters.registry.tables import STATE

CHANGE_TRIES: Final = 5  # while others keep changing names; after that they wait
REMOVAL_WAIT_S: Final = 8.0  # for bytes that are just being deleted
REMOVAL_POLL_S: Final = 0.05
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
            StoreUnavailable: They are being deleted, and that does not end.
            AdapterError: Whatever ``needed``, ``work`` and ``hold`` raise. Nothing has changed.
        """
        hold = hold or self._store.touch
        for _ in range(CHANGE_TRIES):
            with self._reading() as connection:
                seen = _generation_now(connection)
                chosen = needed(connection)
            self._wait_for_removals(chosen.named)
            self._begin_grace(chosen, hold)
            with self._transaction() as connection:
                moved = _generation_now(connection) != seen
                if not moved and not being_removed(connection, chosen.named):
                    return work(connection)
        with self._transaction() as connection:
            chosen = needed(connection)
            if being_removed(connection, chosen.named):
                raise _deletion_goes_on(chosen.named)
            self._begin_grace(chosen, hold)
            return work(connection)

    def _wait_for_removals(self, named: Collection[str]) -> None:
        end = time.monotonic() + REMOVAL_WAIT_S
        while named:
            with self._reading() as connection:
                if not being_removed(connection, named):
                    return
            if time.monotonic() > end:
                raise _deletion_goes_on(named)
            time.sleep(REMOVAL_POLL_S)

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


def _deletion_goes_on(named: Collection[str]) -> StoreUnavailable:
    return StoreUnavailable(
        "The bytes of a version that a name is to be on are being deleted.",
        found=f"a deletion of one of {', '.join(sorted(named))} that has not ended",
        expected=f"an end within {REMOVAL_WAIT_S:g} s",
        fix="Try again in a few minutes, or register the adapter again.",
    )


def _generation_now(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(STATE.c.generation)).scalar_one())
