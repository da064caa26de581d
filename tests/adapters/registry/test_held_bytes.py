"""Changes of names ask an object store before they have others wait, and notice who was quicker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreUnavailable, VersionGone
from adapters.registry import held_bytes, removals
from adapters.registry.objects import Objects
from adapters.registry.records import WantedName
from adapters.registry.registry import Registry
from adapters.registry.remote_store import RemoteStore
from adapters.registry.store import Store, version_of
from tests.stand.folders import hira_folder, small_base
from tests.stand.object_store import in_folder

BASE = small_base()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [hira_folder(root / str(seed), seed=seed) for seed in range(3)]


class Watched:
    """A file system that notes what it is asked while nobody else could change the registry."""

    def __init__(self, root: Path) -> None:
        self.files = in_folder(root / "objects")
        self.database = root / "registry.sqlite"
        self.asked_in_transaction: list[str] = []
        self.asked = 0
        self.before: Callable[[str], None] = lambda _: None  # a call of that name

    def __getattr__(self, name: str) -> Any:
        work = getattr(self.files, name)
        if not name.startswith("_"):
            return work

        async def call(*arguments: Any, **more: Any) -> Any:
            self.asked += 1
            with closing(sqlite3.connect(self.database, timeout=0, isolation_level=None)) as one:
                try:
                    one.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    self.asked_in_transaction.append(f"{name} {arguments[0]}")
            found = await work(*arguments, **more)
            self.before(f"{name} {arguments[0]}")
            return found

        return call


class World:
    def __init__(self, root: Path) -> None:
        self.files = Watched(root)
        objects = Objects("s3://bucket/p", open_files=lambda: self.files)
        self.store = RemoteStore(objects, Store(root / "cache"))
        self.registry = Registry(self.files.database, self.store, grace_s=3600.0)

    def register(self, name: str, folder: Path) -> str:
        put = self.registry.register(name, folder, BASE, source="test", replace=True)
        return put[0].version

    def checked(self, version: str) -> Any:
        return self.registry.staged(version, BASE)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.registry.close()
    made.store.close()


def test_no_change_asks_the_store_while_others_wait(world: World, folders: list[Path]) -> None:
    registry, moves = world.registry, world.registry.moves
    world.register("one", folders[0])
    world.register("one", folders[1])
    moves.rollback("one", None, world.checked)
    staged = registry.stage(folders[2], BASE)
    for _ in range(2):
        moves.start_canary("one", staged.version, 10, world.checked)
        moves.abort("one")
    moves.start_canary("one", staged.version, 10, world.checked)
    moves.promote("one")
    other = registry.staged(version_of(folders[0]), BASE)
    registry.apply([WantedName("one", other, "test"), WantedName("two", staged, "test")])
    registry.apply([], ["two"])
    registry.remove("one")
    assert world.files.asked > 20
    assert world.files.asked_in_transaction == []


def test_what_a_collector_took_meanwhile_is_not_named(
    world: World, folders: list[Path], tmp_path: Path
) -> None:
    first = world.register("one", folders[0])
    second = world.register("one", folders[1])
    other = RemoteStore(
        Objects("s3://bucket/p", open_files=lambda: in_folder(tmp_path / "objects")),
        Store(tmp_path / "other"),
    )
    collector = Registry(world.files.database, other, kept_versions=0, grace_s=0.0)
    begun: list[str] = []

    def collect(call: str) -> None:
        """Another machine does, when the grace of the first version has been begun again."""
        if call.startswith("_pipe_file") and call.endswith(f"held/{first}"):
            begun.append(call)
            if len(begun) == 2:
                assert collector.collect_garbage(grace_s=0.0) == [first]

    world.files.before = collect
    with pytest.raises(VersionGone):
        world.registry.moves.rollback("one", first, world.checked)
    assert len(begun) == 2
    assert world.registry.resolve("one").version == second
    collector.close()
    other.close()


def test_what_a_name_leaves_has_its_grace_whoever_put_it_there(
    world: World, folders: list[Path], tmp_path: Path
) -> None:
    world.register("one", folders[0])
    second = version_of(folders[1])
    other = Registry(world.files.database, Store(tmp_path / "other"))
    moved: list[str] = []

    def replace(call: str) -> None:
        """Another admin does, when the third version's grace has been begun."""
        if call.startswith("_pipe_file") and call.endswith(version_of(folders[2])) and not moved:
            moved.append(call)
            other.register("one", folders[1], BASE, source="test", replace=True)

    world.store.add(folders[1])
    world.files.before = replace
    third = world.register("one", folders[2])
    assert moved
    assert world.registry.resolve("one").version == third
    assert second in held_in(tmp_path)
    other.close()


class Collecting(Store):
    """Does something before and after bytes are deleted, while nobody has been told of it."""

    def __init__(
        self,
        root: Path,
        *,
        before: Callable[[], object] = lambda: None,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(root)
        self.before, self.then = before, then

    def remove(self, version: str, *, idle_s: float = 0.0) -> bool:
        self.before()
        removed = super().remove(version, idle_s=idle_s)
        self.then()
        return removed


class Touching(Store):
    """Does something when the grace of a version has begun."""

    then: Callable[[str], object] = staticmethod(lambda version: None)

    def touch(self, version: str) -> None:
        super().touch(version)
        self.then(version)


def test_bytes_whose_removal_was_cut_off_are_not_named(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_bytes, "REMOVAL_WAIT_S", 0.1)
    store = Touching(tmp_path / "store")
    registry = Registry(tmp_path / "registry.sqlite", store, grace_s=3600.0)

    def collect_and_die() -> None:
        killed = Collecting(tmp_path / "store", then=lambda: os.kill(os.getpid(), signal.SIGKILL))
        Registry(tmp_path / "registry.sqlite", killed, kept_versions=0).collect_garbage(grace_s=0.0)

    def collect(version: str) -> None:
        store.then = lambda _: None
        child = multiprocessing.get_context("fork").Process(target=collect_and_die)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL

    first, second = (
        registry.register("one", folder, BASE, source="test", replace=True)[0].version
        for folder in folders[:2]
    )
    staged = registry.staged(first, BASE)
    store.then = collect
    with pytest.raises(StoreUnavailable, match="are being deleted"):
        registry.moves.rollback("one", first, lambda _: staged)
    assert not store.has(first)
    monkeypatch.setattr(removals, "REMOVED_WITHIN_S", 0.0)  # as later: the store says what is there
    with pytest.raises(VersionGone):
        registry.moves.rollback("one", first, lambda _: staged)
    assert registry.resolve("one").version == second
    put = registry.register("one", folders[0], BASE, source="test", replace=True)
    assert store.has(put[0].version)
    registry.close()


def test_nobody_waits_while_bytes_are_deleted_but_who_would_name_them(
    tmp_path: Path, folders: list[Path]
) -> None:
    deleting, goes_on = threading.Event(), threading.Event()

    def slow() -> None:
        deleting.set()
        assert goes_on.wait(60)

    registry = Registry(tmp_path / "registry.sqlite", Store(tmp_path / "store"))
    collector = Registry(
        tmp_path / "registry.sqlite", Collecting(tmp_path / "store", before=slow), kept_versions=0
    )
    first, second = (
        registry.register("one", folder, BASE, source="test", replace=True)[0].version
        for folder in folders[:2]
    )
    staged = registry.staged(first, BASE)
    with ThreadPoolExecutor(2) as pool:
        collected = pool.submit(collector.collect_garbage, grace_s=0.0)
        assert deleting.wait(60)
        back = pool.submit(registry.moves.rollback, "one", first, lambda _: staged)
        registry.register("two", folders[2], BASE, source="test")
        assert not back.done()  # it waits for the end of the deletion
        goes_on.set()
        assert collected.result(60) == [first]
        with pytest.raises(VersionGone):
            back.result(60)
    assert registry.resolve("one").version == second
    assert registry.resolve("two").version == version_of(folders[2])
    for one in (registry, collector):
        one.close()


def held_in(root: Path) -> set[str]:
    """Versions whose grace was begun."""
    return {one.name for one in (root / "objects").rglob("held/*")}
