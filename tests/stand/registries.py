"""Registries for tests, on SQLite and, where there is one, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from adapters.registry.registry import Registry
from adapters.registry.store import Store
from adapters.registry.tables import METADATA
from tests.stand import postgres

MISSING = postgres.why_not()
Made = Callable[..., Registry]


@contextmanager
def databases(kind: str) -> Iterator[str | None]:
    """The URL of a database of its own; None for SQLite, which has a file in each folder."""
    if kind == "sqlite":
        yield None
        return
    with postgres.postgres() as database:
        yield database.url


def made_in(folder: Path, url: str | None, **options: Any) -> Registry:
    """An empty registry whose bytes, and whose SQLite file, are in ``folder``."""
    if url is not None:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        METADATA.drop_all(engine)
    return Registry(url or folder / "registry.sqlite", Store(folder / "store"), **options)
