"""The history of a name, and going back in it, on both databases."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AlreadyCurrent,
    CorruptFile,
    NameMoved,
    StoreFull,
    VersionGone,
    VersionNotFound,
)
from adapters.registry import history
from adapters.registry.records import WantedName
from adapters.registry.registry import Registry
from adapters.registry.store import Store, version_of
from adapters.registry.tables import NAME_VERSIONS, STATE
from adapters.signature import BaseSignature
from tests.stand.registries import base, folders, made_in, url

__all__ = ["base", "folders", "url"]  # the fixtures


@pytest.fixture
def registry(tmp_path: Path, url: str | None) -> Registry:
    return made_in(tmp_path, url)


def put(registry: Registry, base: BaseSignature, name: str, *folders: Path) -> list[str]:
    """Register ``folders`` one after the other under one name; returns the versions."""
    return [
        registry.register(name, folder, base, source=str(folder), replace=True)[0].version
        for folder in folders
    ]


def back(
    registry: Registry, base: BaseSignature, name: str, version: str | None = None
) -> tuple[str, str]:
    """Roll back; returns the version now and that of before."""
    now, before = registry.moves.rollback(name, version, lambda one: registry.staged(one, base))
    assert registry.resolve(name) == now
    return now.version, before.version


def told(registry: Registry, name: str) -> list[tuple[int, str, str, int | None]]:
    """The history of a name, the oldest first."""
    found = registry.moves.history(name)
    return [(one.number, one.version, one.act, one.restores) for one in reversed(found)]


def test_each_move_is_in_the_history_and_the_same_again_is_not(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    first, second = put(registry, base, "a", folders[0], folders[1])
    put(registry, base, "a", folders[1])
    put(registry, base, "b", folders[2])
    record = registry.staged(first, base)
    registry.apply([WantedName("a", record, "manifest")])
    assert told(registry, "a") == [
        (1, first, "registered", None),
        (2, second, "replaced", None),
        (3, first, "applied", None),
    ]
    newest = registry.moves.history("a")[0]
    assert newest.source == "manifest"
    assert newest.acted == registry.resolve("a").created
    assert newest.tensor_bytes == record.tensor_bytes > 0
    assert [one.version for one in registry.moves.history("b")] == [version_of(folders[2])]
    registry.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.moves.history("a")
    put(registry, base, "a", folders[3])
    assert len(registry.moves.history("a")) == 1


def test_rolling_back_again_goes_further_back_and_never_to_what_was_left(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    one, two, three = put(registry, base, "a", *folders[:3])
    registry.update("a", pinned=True)
    assert back(registry, base, "a") == (two, three)
    assert back(registry, base, "a") == (one, two)
    with pytest.raises(VersionNotFound, match="no version before"):
        back(registry, base, "a")
    assert registry.resolve("a").pinned
    assert registry.resolve("a").source == str(folders[0])
    assert back(registry, base, "a", three) == (three, one)
    assert told(registry, "a")[3:] == [
        (4, two, "rolled_back", 2),
        (5, one, "rolled_back", 1),
        (6, three, "rolled_back", 3),
    ]
    assert back(registry, base, "a") == (two, three)


def test_a_version_may_be_named_by_its_first_digits(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    one, two = put(registry, base, "a", *folders[:2])
    assert back(registry, base, "a", one[:8]) == (one, two)
    for unknown in (two[:5], "0" * 32, "", "%", version_of(folders[3])):
        with pytest.raises(VersionNotFound) as caught:
            back(registry, base, "a", unknown)
        assert one in (caught.value.expected or "")


def test_what_cannot_be_gone_back_to_changes_nothing(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    one, two = put(registry, base, "a", *folders[:2])
    generation = registry.generation()
    with pytest.raises(AlreadyCurrent):
        back(registry, base, "a", two)
    for nobody in ("b", "", "\0", "\ud800"):
        with pytest.raises(AdapterNotFound):
            back(registry, base, nobody)
    path = registry.store.path(one) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFile):
        back(registry, base, "a")
    shutil.rmtree(registry.store.path(one))
    with pytest.raises(VersionGone) as caught:
        back(registry, base, "a")
    assert caught.value.found == one
    assert registry.resolve("a").version == two
    assert registry.generation() == generation


def test_who_comes_too_late_is_told_and_moves_nothing(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    put(registry, base, "a", *folders[:3])
    moved: list[str] = []

    def while_checked(version: str) -> object:
        moved.extend(put(registry, base, "a", folders[3]))
        return registry.staged(version, base)

    with pytest.raises(NameMoved) as caught:
        registry.moves.rollback("a", None, while_checked)  # type: ignore[arg-type]
    assert caught.value.found == registry.resolve("a").version == moved[0]


def test_of_many_rollbacks_at_once_one_moves_the_name(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    _, two, three = put(registry, base, "a", *folders[:3])
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def roll() -> None:
        def checked(version: str) -> object:
            found = registry.staged(version, base)
            barrier.wait(60)
            return found

        try:
            registry.moves.rollback("a", None, checked)  # type: ignore[arg-type]
        except NameMoved:
            outcomes.append("moved")
        else:
            outcomes.append("done")

    threads = [threading.Thread(target=roll) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(outcomes) == ["done", "moved", "moved", "moved"]
    assert told(registry, "a")[-1] == (4, two, "rolled_back", 2)
    assert three in registry.versions_kept()


def test_bytes_of_the_latest_old_versions_are_kept_and_no_others(
    tmp_path: Path, url: str | None, base: BaseSignature, folders: list[Path]
) -> None:
    registry = made_in(tmp_path, url, kept_versions=2)
    versions = put(registry, base, "a", *folders)
    assert registry.collect_garbage(grace_s=0) == sorted(versions[:2])
    assert registry.store.versions() == set(versions[2:])
    assert back(registry, base, "a", versions[2]) == (versions[2], versions[4])
    assert registry.collect_garbage(grace_s=0) == []
    with pytest.raises(VersionGone):
        back(registry, base, "a", versions[0])
    # Another name on one of them keeps it, whatever the history of this one says.
    fewer = Registry(registry.url, registry.store, kept_versions=0)
    registry.register("b", folders[3], base, source="x")
    assert fewer.collect_garbage(grace_s=0) == [versions[4]]
    fewer.remove("a")
    fewer.remove("b")
    assert set(fewer.collect_garbage(grace_s=0)) == {versions[2], versions[3]}


def test_old_versions_make_place_for_a_new_adapter_the_oldest_first(
    tmp_path: Path, url: str | None, base: BaseSignature, folders: list[Path]
) -> None:
    registry = made_in(tmp_path, url, kept_versions=10, grace_s=0.0)
    versions = put(registry, base, "a", *folders[:3])
    assert isinstance(registry.store, Store)
    registry.store.max_bytes = registry.store.nbytes()
    put(registry, base, "b", folders[3])
    assert registry.store.versions() == {versions[1], versions[2], version_of(folders[3])}
    put(registry, base, "c", folders[4])
    assert versions[1] not in registry.store.versions()
    with pytest.raises(StoreFull):  # what names are on stays
        put(registry, base, "d", folders[0])
    assert registry.resolve("a").version == versions[2]
    assert {one.name for one in registry.list()[0]} == {"a", "b", "c"}


def test_bytes_that_a_request_may_need_do_not_make_place(
    tmp_path: Path, url: str | None, base: BaseSignature, folders: list[Path]
) -> None:
    registry = made_in(tmp_path, url, kept_versions=10, grace_s=600.0)
    versions = put(registry, base, "a", *folders[:2])
    assert isinstance(registry.store, Store)
    registry.store.max_bytes = registry.store.nbytes()
    with pytest.raises(StoreFull):
        put(registry, base, "b", folders[2])
    assert registry.store.versions() == set(versions)


def test_the_history_of_a_name_is_bounded(
    registry: Registry, base: BaseSignature, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "ENTRIES_MAX", 4)
    put(registry, base, "b", folders[0])
    for _ in range(3):
        put(registry, base, "a", *folders[:2])
    assert [one.number for one in registry.moves.history("a")] == [6, 5, 4, 3]
    assert [one.number for one in registry.moves.history("b")] == [1]


def test_a_name_that_was_rolled_back_is_not_put_back_by_the_next_start(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    one, two = put(registry, base, "a", *folders[:2])

    def start(folder: Path) -> str:
        record, _ = registry.register(
            "a", folder, base, source="x", replace=True, spare_rollback=True
        )
        return record.version

    assert start(folders[0]) == one  # no rollback: what the settings say
    assert start(folders[1]) == two
    assert back(registry, base, "a") == (one, two)
    assert start(folders[1]) == one
    assert start(folders[2]) == version_of(folders[2])  # something new


def test_a_database_of_a_former_release_keeps_its_rows_and_begins_a_history(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    versions = [
        put(registry, base, name, folder)[0] for name, folder in zip("ab", folders, strict=False)
    ]
    records = registry.list()
    registry.close()
    engine = sa.create_engine(registry.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        NAME_VERSIONS.drop(connection)
        connection.execute(sa.update(STATE).values(schema_version=2))
    taken = Registry(registry.url, registry.store)
    assert taken.list() == records
    assert told(taken, "a") == [(1, versions[0], "registered", None)]
    assert taken.moves.history("b")[0].acted == taken.resolve("b").created
    put(taken, base, "a", folders[2])
    assert back(taken, base, "a")[0] == versions[0]
    assert told(Registry(registry.url, registry.store), "a") == told(taken, "a")


def test_an_sqlite_file_of_the_second_release_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as old:
        old.executescript(SECOND_TABLES)
    old.close()
    taken = Registry(path, Store(tmp_path / "store"))
    assert taken.resolve("kept").version == "0" * 32
    (entry,) = taken.moves.history("kept")
    assert (entry.version, entry.tensor_bytes, entry.source) == ("0" * 32, 12, "here")


SECOND_TABLES = """
CREATE TABLE adapters (name VARCHAR(64) NOT NULL, version VARCHAR(64) NOT NULL,
    pinned BOOLEAN NOT NULL, created VARCHAR(40) NOT NULL, source TEXT NOT NULL,
    facts JSON NOT NULL, base_digest VARCHAR(64), PRIMARY KEY (name));
CREATE INDEX ix_adapters_version ON adapters (version);
CREATE TABLE state (id INTEGER NOT NULL, schema_version INTEGER NOT NULL,
    generation BIGINT NOT NULL, PRIMARY KEY (id));
INSERT INTO state VALUES (1, 2, 7);
INSERT INTO adapters VALUES ('kept', '00000000000000000000000000000000', 1,
    '2026-01-01T00:00:00+00:00', 'here', '{"method": "hira", "task": "fill-mask", "labels": null,
    "ranks": [4, 4], "targets": ["q"], "tensor_bytes": 12, "parameters": 6, "sparsity": 0.0,
    "base_name": null, "notes": []}', 'digest');
"""


@dataclass
class Model:
    """What a registry shall say, as lists alone."""

    entries: list[tuple[str, int | None]] = field(default_factory=list)  # version, restores

    def put(self, version: str) -> None:
        if not self.entries or self.entries[-1][0] != version:
            self.entries.append((version, None))

    def back(self) -> str:
        current, restores = self.entries[-1]
        at = len(self.entries) - 1 if restores is None else restores
        for place in range(at - 1, -1, -1):
            if self.entries[place][0] != current:
                self.entries.append((self.entries[place][0], place))
                return self.entries[place][0]
        raise VersionNotFound("none")

    def kept(self, most: int) -> set[str]:
        current = self.entries[-1][0]
        old = [version for version, _ in reversed(self.entries) if version != current]
        return set(list(dict.fromkeys(old))[:most])


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(0, 6), max_size=14), most=st.integers(0, 3))
def test_any_order_of_moves_is_what_lists_say(
    steps: list[int], most: int, base: BaseSignature, folders: list[Path]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        registry = made_in(Path(root), None, kept_versions=most)
        model = Model()
        for step in [0, *steps]:
            if step < len(folders):
                model.put(put(registry, base, "a", folders[step])[0])
            else:
                expected: str | None = None
                with suppress(VersionNotFound):
                    expected = model.back()
                if expected is None:
                    with pytest.raises(AdapterError):
                        back(registry, base, "a")
                else:
                    assert back(registry, base, "a")[0] == expected
            found = [
                (version, None if restores is None else restores - 1)
                for _, version, _, restores in told(registry, "a")
            ]
            assert found == model.entries
            assert registry.versions_kept() == model.kept(most)
        registry.collect_garbage(grace_s=0)
        assert registry.store.versions() == {model.entries[-1][0]} | model.kept(most)
        registry.close()
