"""Deletes the bytes of versions that nobody needs; nobody waits for the store meanwhile.

That a version is being removed is written down before its bytes are deleted, and taken back when
they are. So a change that would put a name on it sees that, even where whoever deletes ended in
between and never told what became of the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Final

import sqlalchemy as sa

from adapters.registry.adapter_bytes import AdapterBytes
from adapters.registry.history import kept_versions
from adapters.registry.records import count_change
from adapters.registry.tables import ADAPTERS, CANARIES, REMOVALS

# Far more than all calls of a store that deletes one version may take together. Later the bytes are
# there or not, and whoever asks the store is told.
REMOVED_WITHIN_S: Final = 120.0


class Removals:
    """See the module.

    Args:
        transaction: Of the database.
        store: Where the bytes are.
    """

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[sa.Connection]], store: AdapterBytes
    ) -> None:
        self._transaction = transaction
        self._store = store

    def remove(self, version: str, grace_s: float, keep: int | None) -> bool:
        """Delete the bytes of a version unless a name is on it, or they are younger than that.

        Args:
            version: Of the bytes.
            grace_s: Bytes that were added, named or left by a name within it stay.
            keep: So many old versions of a name stay as well; None for none.

        Returns:
            Whether they were deleted.

        Raises:
            StoreUnavailable: The store does not answer; the bytes may be gone all the same.
        """
        with self._transaction() as connection:
            if _has_a_name(connection, version):
                return False
            if keep is not None and version in kept_versions(connection, keep, version):
                return False
            if being_removed(connection, [version]):
                return False  # by another
            connection.execute(sa.delete(REMOVALS).where(REMOVALS.c.version == version))
            connection.execute(sa.insert(REMOVALS), {"version": version, "since": time.time()})
        removed = True  # unless the store says that it is there
        try:
            removed = self._store.remove(version, idle_s=grace_s)
        finally:
            with self._transaction() as connection:
                connection.execute(sa.delete(REMOVALS).where(REMOVALS.c.version == version))
                if removed:
                    count_change(connection)  # who is about to name it looks again
        return removed


def being_removed(connection: sa.Connection, versions: Collection[str]) -> bool:
    """Whether the bytes of any of ``versions`` are being deleted, as far as it is written down."""
    query = sa.select(REMOVALS.c.version).where(
        REMOVALS.c.version.in_(list(versions)), REMOVALS.c.since > time.time() - REMOVED_WITHIN_S
    )
    return connection.execute(query).first() is not None


def _has_a_name(connection: sa.Connection, version: str) -> bool:
    return any(
        connection.execute(sa.select(column).where(column == version)).first() is not None
        for column in (ADAPTERS.c.version, CANARIES.c.version)
    )
