"""The registry's tables, and how an older file becomes one of today.

A migration is a function in a list; the schema's version is how many have run. With few tables
and one writer that is all it takes, where a migration framework would bring its own configuration,
templates and command line.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import sqlalchemy as sa

METADATA = sa.MetaData()

ADAPTERS = sa.Table(
    "adapters",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(64), nullable=False, index=True),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("created", sa.String(40), nullable=False),  # ISO 8601, UTC
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    # Digest of the base that this version was checked on; null: written before it was kept.
    sa.Column("base_digest", sa.String(64), nullable=True),
)
# What each name was on, in order: a row for every time that it was put on another version.
NAME_VERSIONS = sa.Table(
    "versions",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # from 1, of the name
    sa.Column("version", sa.String(64), nullable=False, index=True),
    sa.Column("act", sa.String(16), nullable=False),
    sa.Column("acted", sa.String(40), nullable=False),  # ISO 8601, UTC
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("tensor_bytes", sa.BigInteger, nullable=False),
    # Of a rollback: the number of the row whose version came back.
    sa.Column("restores", sa.Integer, nullable=True),
)
# Other names under which an adapter is asked for.
ALIASES = sa.Table(
    "aliases",
    METADATA,
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, index=True),
)
# The version that gets a share of a name's traffic beside the one that the name is on.
CANARIES = sa.Table(
    "canaries",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(64), nullable=False, index=True),
    sa.Column("share", sa.Float, nullable=False),  # percent
    sa.Column("started", sa.String(40), nullable=False),  # ISO 8601, UTC
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("base_digest", sa.String(64), nullable=True),
    sa.Column("facts", sa.JSON, nullable=False),
)
STATE = sa.Table(
    "state",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),  # grows with every change
)
# One row: what no other registry is called, to know whose an object store is.
IDENTITY = sa.Table(
    "identity",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("registry_id", sa.String(32), nullable=False),
)
# Versions whose bytes are being deleted.
REMOVALS = sa.Table(
    "removals",
    METADATA,
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("since", sa.Float, nullable=False),  # seconds since 1970
)


class SchemaTooNew(RuntimeError):
    """The registry was written by a later release than this one."""


def _first(connection: sa.Connection) -> None:
    METADATA.create_all(connection)
    connection.execute(sa.insert(STATE), {"id": 1, "schema_version": 0, "generation": 0})


def _base_digest(connection: sa.Connection) -> None:
    present = {column["name"] for column in sa.inspect(connection).get_columns(ADAPTERS.name)}
    if ADAPTERS.c.base_digest.name not in present:  # tables made by _first today have it already
        connection.exec_driver_sql("ALTER TABLE adapters ADD COLUMN base_digest VARCHAR(64)")


def _begin_history(connection: sa.Connection) -> None:
    """The history of a name begins with what it is on: more was not written down."""
    NAME_VERSIONS.create(connection, checkfirst=True)  # _first of today has made it already
    for row in connection.execute(sa.select(ADAPTERS)).all():
        values = {
            "name": row.name,
            "number": 1,
            "version": row.version,
            "act": "registered",
            "acted": row.created,
            "source": row.source,
            "tensor_bytes": int(row.facts.get("tensor_bytes", 0)),
        }
        connection.execute(sa.insert(NAME_VERSIONS), values)


def _aliases_and_canaries(connection: sa.Connection) -> None:
    for table in (ALIASES, CANARIES):
        table.create(connection, checkfirst=True)


def _give_identity(connection: sa.Connection) -> None:
    IDENTITY.create(connection, checkfirst=True)
    if connection.execute(sa.select(IDENTITY.c.id)).first() is None:
        connection.execute(sa.insert(IDENTITY), {"id": 1, "registry_id": uuid.uuid4().hex})


def _note_removals(connection: sa.Connection) -> None:
    REMOVALS.create(connection, checkfirst=True)


MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (
    _first,
    _base_digest,
    _begin_history,
    _aliases_and_canaries,
    _give_identity,
    _note_removals,
)


def migrate(connection: sa.Connection) -> None:
    """Bring the database to today's schema, inside the caller's transaction.

    Raises:
        SchemaTooNew: It has a schema that this release does not know.
    """
    done = 0
    if sa.inspect(connection).has_table(STATE.name):
        done = int(connection.execute(sa.select(STATE.c.schema_version)).scalar_one())
    if done > len(MIGRATIONS):
        raise SchemaTooNew(
            f"The registry has schema version {done}; this release knows up to {len(MIGRATIONS)}. "
            "Use the release that wrote it, or another data folder."
        )
    for step in MIGRATIONS[done:]:
        step(connection)
    if done < len(MIGRATIONS):
        connection.execute(sa.update(STATE).values(schema_version=len(MIGRATIONS)))
