"""Changes of names ask an object store before they have others wait, and notice who was quicker."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import VersionGone
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
    begun = []

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
    moved = []

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


def held_in(root: Path) -> set[str]:
    """Versions whose grace was begun."""
    return {one.name for one in (root / "objects").rglob("held/*")}
