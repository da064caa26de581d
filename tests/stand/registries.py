"""Registries for tests, on SQLite and, where there is one, on PostgreSQL, with a base and adapters
to register: fixtures that a test module imports by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.registry.registry import Registry
from adapters.registry.store import Store
from adapters.registry.tables import METADATA
from adapters.signature import BaseSignature
from tests.stand import postgres
from tests.stand.folders import hira_folder, small_base

MISSING = postgres.why_not()
Made = Callable[..., Registry]
KINDS = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING))),
]


@pytest.fixture(scope="module")
def base() -> BaseSignature:
    """What the adapters of ``folders`` fit."""
    return small_base()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five adapters, each with other numbers."""
    root = tmp_path_factory.mktemp("adapters")
    return [hira_folder(root / str(seed), seed=seed) for seed in range(5)]


@pytest.fixture(scope="module", params=KINDS)
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """A database of each kind; None: an SQLite file in each folder."""
    with databases(request.param) as found:
        yield found


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
