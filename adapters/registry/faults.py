"""The registry's database as it is reached: connections with bounds in time, and what is wrong
with it, in one line and without its password."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from adapters.errors import AdapterError
from adapters.registry.tables import SchemaTooNew

CONNECT_S: Final = 3  # libpq counts whole seconds, two at least
STATEMENT_S: Final = 5.0  # of one statement, its wait for a lock included; SQLite's wait for a lock
LIMIT_S: Final = 8.0  # of one use of a connection: for a server that says nothing at all any more


def connected(url: str) -> sa.Engine:
    """An engine whose connections are made, and whose statements end, within stated bounds.

    PostgreSQL: CONNECT_S to connect, STATEMENT_S a statement (a wait for a lock included), told to
    the server; what the URL itself says goes before. SQLite: STATEMENT_S waiting for a lock.
    Others: their drivers' own bounds. See also ``time_limit``.

    Args:
        url: A SQLAlchemy URL; the folder of an SQLite file is made when missing.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(
            parsed,
            poolclass=sa.NullPool,  # changes are rare, and a connection that waits can go stale
            connect_args=_network_bounds(parsed),
        )
    path = parsed.database
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        parsed,
        connect_args={"timeout": STATEMENT_S, "check_same_thread": False},
        poolclass=sa.QueuePool,
        pool_timeout=STATEMENT_S,
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun by hand
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()
        if path and os.path.exists(path):
            os.chmod(path, 0o600)

    return engine


def _network_bounds(url: sa.URL) -> dict[str, Any]:
    """Arguments of the driver for its connections."""
    if url.get_backend_name() != "postgresql":
        return {}
    milliseconds = int(STATEMENT_S * 1000)
    bounds = {
        "connect_timeout": CONNECT_S,
        "tcp_user_timeout": milliseconds,  # for what was sent and never arrived
        "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
    }
    return {name: value for name, value in bounds.items() if name not in url.query}


@contextmanager
def time_limit(connection: sa.Connection, seconds: float | None = None) -> Iterator[None]:
    """End what waits for the network inside the block after ``seconds`` (LIMIT_S).

    A server that is stopped, or a network that swallows everything, answers no statement and obeys
    no timeout of its own. The connection is shut, so the driver raises what it raises when a server
    goes away. Nothing is done for databases in files, which have no network.
    """
    number = _socket_of(connection)
    if number is None:
        yield
        return
    # A socket of its own on the same connection: the number may mean something else later.
    own = socket.socket(fileno=os.dup(number))

    def shut() -> None:
        with suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(LIMIT_S if seconds is None else seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # no thread is left over for a fork
        own.close()


def _socket_of(connection: sa.Connection) -> int | None:
    """The file number of the driver's connection, where it has one."""
    read = getattr(connection.connection.driver_connection, "fileno", None)
    return int(read()) if callable(read) else None


class RegistryUnusable(RuntimeError):
    """The registry cannot be opened; the message says why, for an operator."""


@contextmanager
def database_faults(database: str) -> Iterator[None]:
    """Turn whatever the database raises inside the block into ``RegistryUnusable``.

    Args:
        database: A SQLAlchemy URL or the path of an SQLite file; its password never shows.
    """
    try:
        url = sa.make_url(database if "://" in database else f"sqlite:///{database}")
    except (sa.exc.ArgumentError, ValueError):
        raise RegistryUnusable("registry_url is not a URL as SQLAlchemy has them") from None
    try:
        yield
    except TypeError as error:
        # SQLAlchemy reads the version of the server as text, and psycopg gives bytes then.
        if url.get_backend_name() != "postgresql" or "bytes" not in str(error):
            raise
        shown = url.set(query={}).render_as_string(hide_password=True)
        raise RegistryUnusable(
            f"the registry {shown} cannot be used: its database sends bytes for text, as one with "
            "the encoding SQL_ASCII does; use one made with ENCODING 'UTF8'"
        ) from None
    except (sa.exc.SQLAlchemyError, ImportError, SchemaTooNew, AdapterError, OSError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        secrets = [url.password, *(one for value in url.query.values() for one in _each(value))]
        for secret in (str(one) for one in secrets if one):
            for written in (secret, quote(secret, safe=""), quote_plus(secret)):
                reason = reason.replace(written, "***")
        shown = url.set(query={}).render_as_string(hide_password=True)
        raise RegistryUnusable(f"the registry {shown} cannot be used: {reason[:500]}") from None


def _each(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
