"""A registry that cannot be opened is said in one line for an operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.registry.faults import RegistryUnusable, database_faults
from adapters.registry.registry import Registry
from adapters.registry.store import Store
from tests.stand import postgres

MISSING = postgres.why_not()
BYTES = TypeError("cannot use a string pattern on a bytes-like object")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_database_without_an_encoding_is_refused_by_name(tmp_path: Path) -> None:
    with (
        postgres.postgres("SQL_ASCII") as database,
        pytest.raises(RegistryUnusable, match="ENCODING 'UTF8'"),
        database_faults(database.url),
    ):
        Registry(database.url, Store(tmp_path / "store")).check()


def test_bytes_for_text_are_a_fault_of_the_database() -> None:
    with (
        pytest.raises(RegistryUnusable, match=r"x:\*\*\*@localhost.*SQL_ASCII"),
        database_faults("postgresql+psycopg://x:secret@localhost/y"),
    ):
        raise BYTES


@pytest.mark.parametrize("database", ["postgresql+psycopg://localhost/y", "registry.sqlite"])
def test_other_type_errors_are_not_taken_for_one(database: str) -> None:
    fault = BYTES if database.endswith("sqlite") else TypeError("a fault of our own")
    with pytest.raises(TypeError), database_faults(database):
        raise fault
