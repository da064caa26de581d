from __future__ import annotations

import multiprocessing
import shutil
import socket
import sqlite3
import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    InvalidName,
    RegistryUnavailable,
)
from adapters.intake.conversation import UsedConversation
from adapters.registry.database import typed_database_errors
from adapters.registry.faults import _network_bounds, time_limit
from adapters.registry.naming import check_name
from adapters.registry.registry import Registry
from adapters.registry.store import Store
from adapters.registry.tables import STATE, SchemaTooNew
from adapters.signature import BaseSignature
from tests.stand.folders import change_config
from tests.stand.registries import base, folders
from tests.stand.registry_crash import crash_once

__all__ = ["base", "folders"]  # the fixtures


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry.sqlite", Store(tmp_path / "store"))


def again(registry: Registry) -> Registry:
    """Another registry on the same files, as another process has."""
    return Registry(registry.url, registry.store)


def test_a_registered_name_survives(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    record, created = registry.register("a", folders[0], base, source="here", pinned=True)
    assert created
    assert again(registry).resolve("a") == record
    assert record.task == "text-classification"
    assert record.ranks == (4, 4)
    assert record.targets == ("q_lin", "v_lin")
    assert record.created.tzinfo is not None
    assert registry.pinned_versions() == (record.version,)


def test_registering_the_same_again_changes_nothing(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    first, _ = registry.register("a", folders[0], base, source="here")
    generation = registry.generation()
    second, created = registry.register("a", folders[0], base, source="there")
    assert (second, created) == (first, False)
    assert registry.generation() == generation


def test_a_name_moves_only_with_replace(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    first, _ = registry.register("a", folders[0], base, source="x")
    with pytest.raises(AdapterExists):
        registry.register("a", folders[1], base, source="x")
    assert registry.resolve("a") == first
    second, created = registry.register("a", folders[1], base, source="x", replace=True)
    assert created
    assert registry.resolve("a").version == second.version != first.version
    assert registry.store.has(first.version)  # requests under way may still need it


def test_a_name_that_is_taken_leaves_no_bytes(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    registry.register("a", folders[0], base, source="x")
    before = registry.store.versions()
    with pytest.raises(AdapterExists):
        registry.register("a", folders[1], base, source="x")
    assert registry.store.versions() == before


def test_a_wrong_adapter_changes_nothing(
    registry: Registry, base: BaseSignature, folders: list[Path], tmp_path: Path
) -> None:
    registry.register("a", folders[0], base, source="x")
    before = registry.generation(), registry.store.versions()
    bad = change_config(shutil.copytree(folders[1], tmp_path / "bad"), use_dora=True)
    with pytest.raises(AdapterError):
        registry.register("a", bad, base, source="x", replace=True)
    assert (registry.generation(), registry.store.versions()) == before


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "..", "a" * 65, "a b", "ä", "a\n"])
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "hira-imdb", "a.b_c-d"])
def test_names_that_are_allowed(name: str) -> None:
    check_name(name)


def test_what_another_process_commits_is_seen_at_once(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    other = again(registry)
    with pytest.raises(AdapterNotFound):
        other.resolve("a")
    for folder in folders[:3]:
        record, _ = registry.register("a", folder, base, source="x", replace=True)
        assert other.resolve("a") == record
        assert registry.resolve("a") == record
    other.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["register", "replace", "pin", "remove"]),
            st.integers(0, 3),
            st.integers(0, 2),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_what_is_kept_in_memory_is_what_a_fresh_read_finds(
    steps: list[tuple[str, int, int, bool]], base: BaseSignature, folders: list[Path]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        writer = Registry(Path(root) / "registry.sqlite", Store(Path(root) / "store"))
        reader = again(writer)
        for action, name, folder, looks in steps:
            with suppress(AdapterExists, AdapterNotFound):
                if action in ("register", "replace"):
                    writer.register(
                        f"n{name}", folders[folder], base, source="", replace=action == "replace"
                    )
                elif action == "pin":
                    writer.update(f"n{name}", pinned=bool(folder))
                else:
                    writer.remove(f"n{name}")
            if looks:
                assert reader.list() == again(writer).list()
        assert reader.list() == again(writer).list()


def test_names_are_listed_by_page(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    for name in ("b-2", "a-1", "b-1", "b-3"):
        registry.register(name, folders[0], base, source="x")
    records, total = registry.list(prefix="b-", offset=1, limit=1)
    assert [record.name for record in records] == ["b-2"]
    assert total == 3


def test_pins_change_and_removal_of_the_unknown_is_an_error(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    registry.register("a", folders[0], base, source="x")
    assert registry.update("a", pinned=True).pinned
    assert registry.resolve("a").pinned
    with pytest.raises(AdapterNotFound):
        registry.update("b", pinned=True)
    with pytest.raises(AdapterNotFound):
        registry.remove("b")


def test_garbage_is_what_nobody_names_or_uses(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    versions = [
        registry.register(f"a{index}", folder, base, source="x")[0].version
        for index, folder in enumerate(folders[:3])
    ]
    registry.register("also", folders[0], base, source="x")
    for index in range(3):
        registry.remove(f"a{index}")
    assert registry.collect_garbage() == []  # within the grace
    assert registry.collect_garbage({versions[1]}, grace_s=0) == [versions[2]]
    assert registry.store.versions() == {versions[0], versions[1]}
    assert registry.resolve("also").version == versions[0]


def test_start_up_reports_names_without_bytes_and_collects_orphans(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    lost, _ = registry.register("lost", folders[0], base, source="x")
    registry.register("kept", folders[1], base, source="x")
    orphan = registry.store.add(folders[2])
    registry.store.remove(lost.version)
    assert again(registry).check() == ["lost"]
    assert not registry.store.has(orphan)


def test_of_two_at_once_one_wins(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(2)

    def register(folder: Path) -> None:
        barrier.wait()
        try:
            registry.register("a", folder, base, source="x")
        except AdapterExists:
            outcomes.append("exists")
        else:
            outcomes.append("created")

    threads = [threading.Thread(target=register, args=(folder,)) for folder in folders[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created", "exists"]


def test_a_locked_database_is_waited_for(
    registry: Registry, base: BaseSignature, folders: list[Path], tmp_path: Path
) -> None:
    holder = sqlite3.connect(
        tmp_path / "registry.sqlite", isolation_level=None, check_same_thread=False
    )
    holder.execute("BEGIN IMMEDIATE")

    def let_go() -> None:
        holder.execute("ROLLBACK")
        holder.close()

    timer = threading.Timer(0.5, let_go)
    timer.start()
    assert registry.register("a", folders[0], base, source="x")[1]
    timer.join()


def test_a_lock_that_stays_is_a_typed_error_and_readers_go_on(
    tmp_path: Path,
    registry: Registry,
    base: BaseSignature,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = registry.register("a", folders[0], base, source="x")[0].version
    registry.close()
    monkeypatch.setattr("adapters.registry.faults.STATEMENT_S", 0.1)
    holder = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    for change in (
        lambda: registry.register("b", folders[1], base, source="x"),
        lambda: registry.update("a", pinned=True),
        lambda: registry.remove("a"),
    ):
        with pytest.raises(RegistryUnavailable) as caught:
            change()
        assert "locked" in (caught.value.found or "")
    assert registry.resolve("a").version == version
    holder.execute("ROLLBACK")
    holder.close()
    assert registry.register("b", folders[1], base, source="x")[1]


def test_a_damaged_database_answers_nothing_and_a_restored_one_is_taken_up(
    tmp_path: Path, registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    version = registry.register("a", folders[0], base, source="x")[0].version
    registry.close()  # all of it is in the one file now
    path = tmp_path / "registry.sqlite"
    whole = path.read_bytes()
    path.write_bytes(b"\x5a" * len(whole))
    for _ in range(2):
        for look in (registry.versions, registry.list, lambda: registry.resolve("a")):
            with pytest.raises(RegistryUnavailable):
                look()
    path.write_bytes(whole)
    assert registry.resolve("a").version == version


@pytest.mark.parametrize("message", ["", "\n", "gone\nfor good"])
def test_a_driver_that_says_little_is_an_error_all_the_same(message: str) -> None:
    with pytest.raises(RegistryUnavailable) as caught, typed_database_errors():
        raise sa.exc.OperationalError("SELECT 1", {}, sqlite3.OperationalError(message))
    assert caught.value.found == (message.splitlines() or ["OperationalError"])[0]


def test_a_later_schema_is_not_touched(registry: Registry) -> None:
    with sa.create_engine(registry.url).begin() as connection:
        connection.execute(sa.update(STATE).values(schema_version=99))
    with pytest.raises(SchemaTooNew, match="99"):
        again(registry)


def _resolve_in_child(registry: Registry, answers: object) -> None:
    registry.reopen()
    answers.put(registry.resolve("a").version)  # type: ignore[attr-defined]
    registry.close()


def test_a_forked_child_has_connections_of_its_own(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    version = registry.register("a", folders[0], base, source="x")[0].version
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_resolve_in_child, args=(registry, answers))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answers.get() == version
    assert registry.resolve("a").version == version


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_any_moment_loses_nothing_acknowledged(
    tmp_path: Path, folders: list[Path], seed: int
) -> None:
    assert crash_once(tmp_path / "crash", folders, seed) == []


def test_a_pinned_name_stays_pinned_when_its_content_is_replaced(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    registry.register("a", folders[0], base, source="x", pinned=True)
    record, _ = registry.register("a", folders[1], base, source="x", replace=True)
    assert record.pinned
    assert registry.resolve("a").pinned
    registry.update("a", pinned=False)
    record, _ = registry.register("a", folders[2], base, source="x", replace=True)
    assert not record.pinned


def test_the_base_of_a_version_is_kept_and_another_one_is_told_apart(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    first, second = replace(base, digest="one"), replace(base, digest="two")
    registry.register("a", folders[0], first, source="x")
    registry.register("b", folders[1], second, source="x")
    assert [one.name for one in registry.check_base(first, lambda _: None)] == ["b"]
    assert [one.name for one in again(registry).check_base(second, lambda _: None)] == ["a"]
    record, created = registry.register("b", folders[1], first, source="x")
    assert (record.base_digest, created) == ("one", False)
    assert registry.check_base(first, lambda _: None) == []


# The tables as the first release made them.
FIRST_TABLES = """
CREATE TABLE adapters (name VARCHAR(64) NOT NULL, version VARCHAR(64) NOT NULL,
    pinned BOOLEAN NOT NULL, created VARCHAR(40) NOT NULL, source TEXT NOT NULL,
    facts JSON NOT NULL, PRIMARY KEY (name));
CREATE INDEX ix_adapters_version ON adapters (version);
CREATE TABLE state (id INTEGER NOT NULL, schema_version INTEGER NOT NULL,
    generation BIGINT NOT NULL, PRIMARY KEY (id));
INSERT INTO state VALUES (1, 1, 7);
"""


def test_a_database_of_the_first_release_is_taken_over_and_its_versions_are_checked(
    tmp_path: Path, registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    for name, folder in zip(("fits", "not"), folders, strict=False):
        registry.register(name, folder, base, source="x", pinned=True)
    registry.close()
    old = tmp_path / "old.sqlite"
    with sqlite3.connect(old) as target, sqlite3.connect(tmp_path / "registry.sqlite") as source:
        target.executescript(FIRST_TABLES)
        columns = "name, version, pinned, created, source, facts"
        rows = source.execute(f"SELECT {columns} FROM adapters").fetchall()
        target.executemany("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?)", rows)
    target.close()
    source.close()
    taken = Registry(old, registry.store)
    assert {one.base_digest for one in taken.list()[0]} == {None}
    assert taken.resolve("fits").pinned
    bad = taken.resolve("not").version
    shutil.rmtree(taken.store.path(bad))
    served = replace(base, digest="one")
    assert [one.name for one in taken.check_base(served, lambda _: None)] == ["not"]
    assert taken.resolve("fits").base_digest == "one"
    assert again(taken).resolve("fits").base_digest == "one"


def test_a_connection_that_was_lost_is_made_anew_before_anybody_hears_of_it(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    opened: list[sqlite3.Connection] = []
    sa.event.listen(sa.Engine, "connect", lambda driver, _: opened.append(driver))
    registry.close()
    registry.register("a", folders[0], base, source="x")
    registry.resolve("a")
    for driver in opened:
        driver.close()
    assert registry.resolve("a").name == "a"


@pytest.mark.parametrize("held_s", [0.1])
def test_a_network_that_says_nothing_ends_in_bounded_time(held_s: float) -> None:
    here, there = socket.socketpair()
    with here, there:
        fake: Any = SimpleNamespace(connection=SimpleNamespace(driver_connection=here))
        with time_limit(fake, held_s):
            assert here.recv(1) == b""  # would wait for ever


def test_postgresql_is_given_bounds_and_its_url_goes_before() -> None:
    bounds = _network_bounds(sa.make_url("postgresql+psycopg://h/d?connect_timeout=9"))
    assert "connect_timeout" not in bounds
    assert "statement_timeout=5000" in bounds["options"]
    assert _network_bounds(sa.make_url("mysql://h/d")) == {}


def test_what_is_used_of_a_conversation_is_kept_and_found_out_anew_on_another_base(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    first = UsedConversation(True, {"end_ids": [3], "top_p": 0.5}, ("noted",))
    one = replace(base, digest="1")
    record, _ = registry.register("a", folders[0], one, source="x", settle=lambda _: first)
    registry.register("b", folders[0], one, source="x", settle=lambda _: first)
    assert again(registry).resolve("a") == record
    assert (record.chat_template, record.generation) == (True, first.generation)
    assert "noted" in record.notes
    other = replace(base, digest="2")
    now, created = registry.register("a", folders[0], other, source="y")
    assert not created
    assert not now.chat_template
    assert (now.created, now.source) == (record.created, "x")
    for name in ("a", "b"):  # both are on that version
        found = again(registry).resolve(name)
        assert (found.generation, found.base_digest, found.name) == ({}, "2", name)


def test_a_folder_that_a_former_release_registered_is_no_other_content(
    registry: Registry, base: BaseSignature, folders: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "it")
    change_config(folder, task_type=None)
    before, _ = registry.register("a", folder, base, source="x")
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # nobody looked at it
    after, created = registry.register("a", folder, base, source="x")
    assert created
    assert after.version != before.version
    with pytest.raises(AdapterExists):
        registry.register("a", folders[1], base, source="x")
