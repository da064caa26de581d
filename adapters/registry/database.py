"""The database of a registry: connections to read and to write with, and its records, read again
only when somebody has changed them. What may be wrong with it is a typed error.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from adapters.errors import RegistryUnavailable, StoreFull
from adapters.registry.faults import connected, time_limit
from adapters.registry.records import AdapterRecord, read_changes
from adapters.registry.tables import STATE


class Database:
    """Safe in many threads and processes; after a fork, call ``reopen`` in the child first.

    Args:
        url: A SQLAlchemy URL, or the path of an SQLite file, made when missing.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = url if isinstance(url, str) and "://" in url else f"sqlite:///{url}"
        self._lock = threading.RLock()
        self._engine: sa.Engine | None = None
        self._watch: sa.Connection | None = None
        self._known: dict[str, AdapterRecord] = {}
        self._known_at: Any = None

    def records(self) -> Mapping[str, AdapterRecord]:
        """Every record by name, in the order of names, as last committed by any process; quick
        when nothing changed. The mapping never changes."""
        with self._lock:
            self._refresh()
            return self._known

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with, within the bounds of time that all have."""
        with (
            typed_database_errors(),
            self._connected().connect() as connection,
            time_limit(connection),
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def transaction(self, *, alone: bool = True) -> Iterator[sa.Connection]:
        """One write transaction; from its first statement no other one changes a name.

        Args:
            alone: False where the tables may not be there yet; SQLite's are alone always.
        """
        with (
            typed_database_errors(),
            self._connected().connect() as connection,
            time_limit(connection),  # its commit included
            connection.begin(),
        ):
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif alone:
                connection.execute(sa.select(STATE.c.id).with_for_update())
            yield connection

    def reopen(self) -> None:
        """Forget connections that came over a fork; the next call makes new ones."""
        self._lock = threading.RLock()
        if self._engine is not None:
            self._engine.dispose(close=False)  # they belong to the parent
        self._engine = self._watch = None
        self._known_at = None

    def close(self) -> None:
        """Let go of every connection; a later call opens anew."""
        with self._lock:
            if self._watch is not None:
                self._watch.close()
            if self._engine is not None:
                self._engine.dispose()
            self._engine = self._watch = None
            self._known_at = None

    @property
    def _is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def _connected(self) -> sa.Engine:
        with self._lock:
            if self._engine is None:
                self._engine = connected(self.url)
            return self._engine

    def _refresh(self) -> None:
        """Read the table again if any process has committed since; called with the lock held."""
        for last in (self._watch is None, True):
            try:
                with typed_database_errors():
                    self._read_changes()
                return
            except RegistryUnavailable:
                # The connection goes, because after damage, or a server that went away and has come
                # back, only a new one can work; with a new one at once, before anybody hears of it.
                self._drop_watch()
                if last:
                    raise

    def _drop_watch(self) -> None:
        watch, self._watch, self._known_at = self._watch, None, None
        if watch is not None:
            with suppress(sa.exc.SQLAlchemyError):
                watch.invalidate()
                watch.close()

    def _read_changes(self) -> None:
        if self._watch is None:
            self._watch = (
                self._connected().connect().execution_options(isolation_level="AUTOCOMMIT")
            )
        with time_limit(self._watch):
            self._read_watched(self._watch)

    def _read_watched(self, watch: sa.Connection) -> None:
        if self._is_sqlite:
            # Two pages of shared memory: it moves with every commit of every other connection.
            # All writes go through other connections than this one.
            driver: Any = watch.connection.driver_connection
            now: Any = driver.execute("PRAGMA data_version").fetchone()[0]
        else:
            now = watch.execute(sa.select(STATE.c.generation)).scalar_one()
        if now != self._known_at:
            self._known = read_changes(watch, self._known)
            self._known_at = now


@contextmanager
def typed_database_errors() -> Iterator[None]:
    """Turn what a database raises for its own reasons into typed errors.

    Raises:
        StoreFull: Its disk is full.
        RegistryUnavailable: It is locked for too long, damaged, or cannot be reached.
    """
    try:
        yield
    except IntegrityError:
        raise  # a matter of the rows, not of the database
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        lines = str(cause).splitlines() or [type(cause).__name__]  # a driver may say nothing
        reason = lines[0][:200]
        if "full" in reason:
            raise StoreFull(
                "The registry's disk is full.", fix="Free disk space, or remove adapters."
            ) from error
        raise RegistryUnavailable(
            "The registry cannot be used now.",
            found=reason,
            expected="a database that answers",
            fix="Try again in a few seconds; if it stays so, the operator must look at it.",
        ) from error
