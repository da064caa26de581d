from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import AdapterNotFound, BaseMismatch, RegistryUnavailable
from adapters.registry.names import Names
from adapters.registry.records import AdapterRecord


def record(name: str, version: str = "v1", base_digest: str | None = None) -> Any:
    made = SimpleNamespace(name=name, version=version, pinned=True, base_digest=base_digest)
    made.aliases, made.canary, made.versions = (), None, lambda: (version,)
    made.fits = lambda digest: not digest or base_digest == digest
    return made


class Database:
    """A registry whose database can be away or can hang."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def records(self) -> Mapping[str, AdapterRecord]:
        assert self.gate.wait(20)
        if self.away:
            raise RegistryUnavailable("away")
        return dict(self.rows)


def test_answers_go_on_from_what_is_known_while_the_database_is_away() -> None:
    database = Database()
    database.rows["a"] = record("a")
    names = Names(database, lambda: 0)
    assert names.refresh()
    database.away = True
    assert not names.refresh()
    assert names.resolve("a").version == "v1"
    with pytest.raises(RegistryUnavailable):  # it may have been registered elsewhere meanwhile
        names.resolve("b")
    database.away = False
    database.rows["a"] = record("a", "v2")
    assert names.refresh()
    assert names.resolve("a").version == "v2"
    with pytest.raises(AdapterNotFound):
        names.resolve("b")


def test_an_acknowledged_change_that_was_never_read_is_not_guessed() -> None:
    database = Database()
    database.rows["a"] = record("a")
    changes = [0]
    names = Names(database, lambda: changes[0])
    names.refresh()
    changes[0] += 1
    database.away = True
    names.refresh()
    with pytest.raises(RegistryUnavailable):
        names.resolve("a")
    database.away = False
    names.refresh()
    assert names.resolve("a").version == "v1"


def test_a_database_that_hangs_keeps_nobody_waiting_for_what_is_known() -> None:
    database = Database()
    database.rows["a"] = record("a")
    names = Names(database, lambda: 0)
    names.refresh()
    database.gate.clear()
    reading = threading.Thread(target=names.refresh)
    reading.start()
    assert names.resolve("a").version == "v1"
    assert reading.is_alive()
    database.gate.set()
    reading.join(20)


def test_an_adapter_of_another_base_is_refused_with_its_fix_and_not_pinned() -> None:
    database = Database()
    database.rows |= {"a": record("a", "v1", "base1"), "b": record("b", "v2", "base2")}
    database.rows["old"] = record("old", "v3", None)
    names = Names(database, lambda: 0, base_digest="base1")
    names.refresh()
    names.check_fits(names.resolve("a"))
    for name in ("b", "old"):
        with pytest.raises(BaseMismatch) as caught:
            names.check_fits(names.resolve(name))
        assert "Register it again" in (caught.value.fix or "")
    assert names.pinned_versions() == ("v1",)
    assert [one.name for one in names.listed(fitting=True)] == ["a"]
    assert names.versions() == {"v1", "v2", "v3"}


def test_a_file_database_has_no_network_to_limit(tmp_path: Path) -> None:
    import sqlalchemy as sa

    from adapters.registry.faults import connected, time_limit

    with (
        connected(f"sqlite:///{tmp_path / 'x.sqlite'}").connect() as connection,
        time_limit(connection, 0.0),
    ):
        assert connection.execute(sa.text("select 1")).scalar_one() == 1
    assert sqlite3.sqlite_version
