"""The bytes of adapters in an object store, with those in use on this disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterNotFound,
    CacheDiskFull,
    CorruptFile,
    StoreFull,
    StoreUnavailable,
)
from adapters.intake.checkpoint import STORED_FILES, load_adapter
from adapters.intake.safetensors_header import TENSOR_FILE
from adapters.registry.objects import Objects
from adapters.registry.registry import Registry
from adapters.registry.remote_store import LOOKS, READ_WITHIN_S, RemoteStore
from adapters.registry.store import Store, version_of
from tests.stand import object_store
from tests.stand.folders import hira_folder, small_base
from tests.stand.object_store import ObjectStore, in_folder

CONTENTS = 4
CACHE = 1 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [hira_folder(root / str(seed), seed=seed) for seed in range(CONTENTS)]


@pytest.fixture(scope="module")
def real() -> Iterator[ObjectStore]:
    if (missing := object_store.why_not()) is not None:
        pytest.skip(missing)
    with object_store.object_store() as store:
        yield store


class Machines:
    """The stores of machines that have the same objects, each with a disk of its own."""

    def __init__(self, folder: Path, place: str, **options: Any) -> None:
        self.folder = folder
        self.place = place
        self.options = options
        self.made: list[RemoteStore] = []

    def __call__(self, name: str = "a", *, cache_bytes: int = CACHE, **more: Any) -> RemoteStore:
        cache = Store(self.folder / f"cache-{name}")
        objects = Objects(self.place, **self.options)
        self.made.append(RemoteStore(objects, cache, cache_bytes=cache_bytes, **more))
        return self.made[-1]

    def overwrite(self, version: str, content: Path) -> None:
        """Put something else in place of a version's object."""
        objects = Objects(self.place, **self.options)
        objects.put(f"versions/{version}.tar", content)
        objects.close()


@pytest.fixture(params=["folder", "s3"])
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machines]:
    if request.param == "s3":
        store: ObjectStore = request.getfixturevalue("real")
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        made = Machines(tmp_path, f"s3://adapters/{tmp_path.name}", endpoint=store.endpoint)
    else:
        made = Machines(tmp_path, "s3://bucket/p", open_files=lambda: in_folder(tmp_path / "bytes"))
    yield made
    for one in made.made:
        one.close()


def use_long_ago(store: RemoteStore, version: str, ago_s: float = READ_WITHIN_S + 1) -> None:
    """As if the version had been read that long ago."""
    folder = store.root / "versions" / version
    at = folder.stat().st_mtime - ago_s
    os.utime(folder, (at, at))


def test_a_few_versions_are_looked_for_without_a_list_of_all(
    machine: Machines, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine("a")
    present = store.add(folders[0])
    many = {f"{one:032x}" for one in range(LOOKS + 1)}
    assert store.missing({present, *many}) == many
    monkeypatch.setattr(store, "versions", lambda: pytest.fail("all were listed"))
    few = set(sorted(many)[: LOOKS - 1])
    assert store.missing({present, *few}) == few


def test_what_one_machine_adds_another_reads(machine: Machines, folders: list[Path]) -> None:
    first, second = machine("a"), machine("b")
    version = first.add(folders[0])
    assert version == version_of(folders[0])
    assert second.has(version)
    assert second.versions() == {version}
    assert second.missing({version, "0" * 32}) == {"0" * 32}
    assert second.tensor_bytes(version) == 0
    folder = second.sound_path(version)
    assert folder.is_relative_to(second.root)
    for name in STORED_FILES:
        assert (folder / name).exists() == (folders[0] / name).exists()
    assert (folder / TENSOR_FILE).read_bytes() == (folders[0] / TENSOR_FILE).read_bytes()
    assert second.tensor_bytes(version) == (folder / TENSOR_FILE).stat().st_size
    assert load_adapter(folder, small_base()).tensor_bytes > 0
    assert second.nbytes() == first.nbytes() > 0
    assert list((second.root / "arriving").iterdir()) == []
    assert first.remove(version)
    assert not first.remove(version)
    assert not second.has(version)
    assert second.versions() == set()


def test_a_look_counts_as_a_hit_or_a_fetch(machine: Machines, folders: list[Path]) -> None:
    version = machine("a").add(folders[0])
    store = machine("b")
    store.take_notes()
    for _ in range(3):
        store.path(version)
    told = [(one.operation, one.outcome) for one in store.take_notes()]
    assert told.count(("cache", "miss")) == 1
    assert told.count(("cache", "hit")) == 2
    assert told.count(("get", "ok")) == 1


def test_a_version_that_nobody_has_is_not_found(machine: Machines) -> None:
    store = machine()
    for version in ("0" * 32, "../../etc/passwd", "x"):
        assert not store.has(version)
        assert not store.remove(version)
        for call in (store.path, store.sound_path, store.touch, store.conversation):
            with pytest.raises(AdapterNotFound):
                call(version)


def test_a_changed_object_is_an_error_of_its_adapter_alone(
    machine: Machines, folders: list[Path], tmp_path: Path
) -> None:
    first = machine("a")
    good, bad = (first.add(one) for one in folders[:2])
    # Whole, and an adapter, but another one; and then no archive at all.
    packed = tmp_path / "other.tar"
    with tarfile.open(packed, "w") as archive:
        for path in folders[2].iterdir():
            archive.add(path, path.name)
    junk = tmp_path / "junk"
    junk.write_bytes(os.urandom(5000))
    for number, content in enumerate((packed, junk)):
        machine.overwrite(bad, content)
        reader = machine(f"reader-{number}")
        for call in (reader.path, reader.sound_path):
            with pytest.raises(CorruptFile) as caught:
                call(bad)
            assert caught.value.found
            assert caught.value.expected
            assert caught.value.fix
        assert not reader.is_sound(bad)
        assert reader.sound_path(good).is_dir()
        assert reader.missing({good, bad}) == set()
    # To register it again is the remedy that it names.
    assert first.add(folders[1]) == bad
    assert machine("reader-9").is_sound(bad)


def test_damage_on_this_disk_is_fetched_anew(machine: Machines, folders: list[Path]) -> None:
    store = machine()
    version = store.add(folders[0])
    path = store.path(version) / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert store.sound_path(version) == path.parent
    assert path.read_bytes() == (folders[0] / TENSOR_FILE).read_bytes()


def test_a_missing_object_is_still_read_from_this_disk(
    machine: Machines, folders: list[Path]
) -> None:
    store = machine()
    version = store.add(folders[0])
    assert machine("b").remove(version)
    assert store.sound_path(version).is_dir()
    with pytest.raises(AdapterNotFound):
        store.touch(version)


def test_what_was_used_least_lately_is_evicted(machine: Machines, folders: list[Path]) -> None:
    writer = machine("writer")
    versions = [writer.add(one) for one in folders]
    nbytes = writer.root.joinpath("versions", versions[0])
    each = sum(one.stat().st_size for one in nbytes.iterdir())
    store = machine("reader", cache_bytes=int(3.3 * each))
    for number, version in enumerate(versions[:3]):
        store.path(version)
        use_long_ago(store, version, 1000 - number)
    use_long_ago(store, versions[1], -1500)  # the last that was used
    store.path(versions[3])
    kept = {one.name for one in (store.root / "versions").iterdir()}
    assert versions[0] not in kept
    assert {versions[1], versions[3]} <= kept
    assert store.path(versions[0]).is_dir()


def test_what_is_being_read_is_not_evicted(machine: Machines, folders: list[Path]) -> None:
    writer = machine("writer")
    versions = [writer.add(one) for one in folders]
    store = machine("reader", cache_bytes=1)
    for version in versions:
        store.path(version)
    assert {one.name for one in (store.root / "versions").iterdir()} == set(versions)
    for version in versions:
        use_long_ago(store, version)
    store.path(versions[0])
    store.add(folders[1])
    assert {one.name for one in (store.root / "versions").iterdir()} == set(versions[:2])


def test_many_threads_fetch_a_version_once(machine: Machines, folders: list[Path]) -> None:
    version = machine("writer").add(folders[0])
    store = machine("reader")
    start = threading.Barrier(8)

    def read() -> Path:
        start.wait()
        return store.sound_path(version)

    with ThreadPoolExecutor(8) as threads:
        found = {one.result() for one in [threads.submit(read) for _ in range(8)]}
    assert found == {store.root / "versions" / version}
    told = [(one.operation, one.outcome) for one in store.take_notes()]
    assert told.count(("get", "ok")) == 1


@pytest.mark.parametrize("of_one_process", [True, False])
def test_readers_of_a_damaged_copy_are_served_by_one_repair(
    machine: Machines,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    of_one_process: bool,
) -> None:
    version = machine("writer").add(folders[0])
    store = machine("reader")
    other = store if of_one_process else machine("reader")
    tensors = store.path(version) / TENSOR_FILE
    tensors.chmod(0o600)
    tensors.write_bytes(b"damaged")
    plain = Store.is_sound
    seen, repaired = threading.Event(), threading.Event()

    def late_to_act(cache: Store, version: str) -> bool:
        found = plain(cache, version)
        if threading.current_thread() is not threading.main_thread() and not found:
            seen.set()
            assert repaired.wait(60)
        return found

    monkeypatch.setattr(Store, "is_sound", late_to_act)
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(other.sound_path, version)
        assert seen.wait(60)
        folder = store.sound_path(version)
        place = folder.stat().st_ino
        repaired.set()
        assert late.result() == folder
    assert folder.stat().st_ino == place, "what another reads was taken away"
    load_adapter(folder, small_base())
    told = [(one.operation, one.outcome) for one in (*store.take_notes(), *other.take_notes())]
    assert told.count(("get", "ok")) == 2  # the first, and the repair


def test_a_store_that_is_full_takes_no_more(machine: Machines, folders: list[Path]) -> None:
    first = machine("a")
    version = first.add(folders[0])
    store = machine("b", max_bytes=int(1.5 * first.nbytes()))
    assert store.add(folders[0]) == version  # it is there already
    with pytest.raises(StoreFull):
        store.add(folders[1])
    assert store.versions() == {version}


@pytest.mark.parametrize("where", ["copy", "pack"])
def test_a_full_local_disk_deletes_no_old_versions(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """To delete objects frees nothing on this disk; a store that is full is another matter."""
    objects = Objects("s3://bucket/p", open_files=lambda: in_folder(tmp_path))
    here = RemoteStore(objects, Store(tmp_path / "cache"))
    registry = Registry(tmp_path / "registry.sqlite", here, kept_versions=10, grace_s=0.0)
    base = small_base()
    for folder in folders[:2]:
        registry.register("one", folder, base, source="test", replace=True)
    before = here.versions()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as broken:
        if where == "copy":
            broken.setattr("adapters.registry.store._copy_durably", full)
        else:
            broken.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(CacheDiskFull):
            registry.register("two", folders[2], base, source="test")
    assert here.versions() == before
    here.max_bytes = here.nbytes()
    registry.register("two", folders[2], base, source="test")
    assert here.versions() == {version_of(folders[1]), version_of(folders[2])}
    registry.close()
    here.close()


def test_a_second_registry_on_the_same_objects_deletes_none(
    machine: Machines, folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = small_base()
    first = Registry(tmp_path / "first.sqlite", machine("a"), grace_s=0.0)
    first.check()  # the store is empty, and is the first one's from now on
    first.register("one", folders[0], base, source="test")
    store = machine("b")
    second = Registry(tmp_path / "second.sqlite", store, grace_s=0.0)
    with caplog.at_level(logging.ERROR):
        assert second.check() == []
        assert second.collect_garbage(grace_s=0.0) == []
    assert [one.message.count("registry_url") for one in caplog.records] == [1]
    # Nor to make place for what it adds, nor once it has names of its own.
    second.register("one", folders[1], base, source="test")
    second.register("one", folders[2], base, source="test", replace=True)
    everything = store.versions()
    store.max_bytes = store.nbytes()
    with pytest.raises(StoreFull):
        second.register("two", folders[3], base, source="test")
    second.remove("one")
    assert second.collect_garbage(grace_s=0.0) == []
    assert store.versions() == everything
    assert set(first.collect_garbage(grace_s=0.0)) == set(map(version_of, folders[1:3]))
    for one in (first, second):
        one.close()


def test_objects_of_before_become_the_registry_s_that_names_them(
    machine: Machines, folders: list[Path], tmp_path: Path
) -> None:
    base, store = small_base(), machine("a")
    names_them = Registry(tmp_path / "first.sqlite", store, grace_s=0.0)
    kept = names_them.register("one", folders[0], base, source="test")[0].version
    left = store.add(folders[1])
    empty = Registry(tmp_path / "second.sqlite", machine("b"), grace_s=0.0)
    assert empty.collect_garbage(grace_s=0.0) == []
    assert names_them.collect_garbage(grace_s=0.0) == [left]
    assert empty.collect_garbage(grace_s=0.0) == []
    assert store.versions() == {kept}
    for one in (names_them, empty):
        one.close()


def test_the_collector_leaves_what_another_machine_may_need(
    machine: Machines, folders: list[Path], tmp_path: Path
) -> None:
    """Rows name the first and, as an old version, the second; the third was just left."""
    here = machine("a", least_idle_s=3600.0)
    base = small_base()
    registry = Registry(tmp_path / "registry.sqlite", here, kept_versions=1, grace_s=3600.0)
    names = ("one", "two")
    for folder, name in zip((folders[0], folders[1]), names, strict=True):
        registry.register(name, folder, base, source="test")
    left = registry.register("two", folders[2], base, source="test", replace=True)[0].version
    registry.register("two", folders[3], base, source="test", replace=True)
    everything = here.versions()
    assert len(everything) == CONTENTS
    # Even where it is told to wait for nothing, as a server that starts alone does.
    assert registry.collect_garbage(grace_s=0.0) == []
    assert registry.check() == []
    assert here.versions() == everything
    alone = Registry(tmp_path / "registry.sqlite", machine("b"), kept_versions=1, grace_s=0.0)
    gone = alone.collect_garbage(grace_s=0.0)
    assert left not in gone
    assert gone == [version_of(folders[1])]
    assert alone.collect_garbage({*here.versions()}, grace_s=0.0) == []
    registry.close()
    alone.close()


def test_what_is_idle_is_what_may_be_removed(machine: Machines, folders: list[Path]) -> None:
    """By lists of everything, as one look at each version says."""
    store = machine()
    added, named, missing = store.add(folders[0]), store.add(folders[1]), "0" * 32
    store.touch(named)
    assert store.idle({added, named, missing}, 3600.0) == set()
    assert store.idle({added, named, missing}, 0.0) == {added, named}
    assert machine("b", least_idle_s=3600.0).idle({added, named}, 0.0) == set()
    plain = Store(store.root)
    assert plain.idle({added, named, missing}, 0.0) == {added, named}
    assert plain.idle({added, named, missing}, 3600.0) == set()


def test_to_name_a_version_starts_its_grace_anew(machine: Machines, folders: list[Path]) -> None:
    store = machine()
    version = store.add(folders[0])
    assert not store.remove(version, idle_s=3600.0)
    store.touch(version)
    assert not store.remove(version, idle_s=3600.0)
    assert store.remove(version)
    assert store.add(folders[0]) == version


class Broken:
    """A file system whose store is away while ``is_away``."""

    def __init__(self, folder: Path) -> None:
        self.files = in_folder(folder)
        self.is_away = False

    def __getattr__(self, name: str) -> object:
        if self.is_away and name.startswith("_"):
            raise OSError("away")
        return getattr(self.files, name)


def test_while_the_store_is_away_this_disk_answers_and_nothing_is_added(
    folders: list[Path], tmp_path: Path
) -> None:
    broken, now = Broken(tmp_path), [0.0]
    objects = Objects("s3://bucket/p", open_files=lambda: broken, clock=lambda: now[0])
    store = RemoteStore(objects, Store(tmp_path / "cache"))
    registry = Registry(tmp_path / "registry.sqlite", store)
    base = small_base()
    record, _ = registry.register("one", folders[0], base, source="test")
    cold = RemoteStore(objects, Store(tmp_path / "cold"))
    broken.is_away = True
    assert store.sound_path(record.version).is_dir()
    for call in (
        lambda: registry.register("two", folders[1], base, source="test"),
        lambda: registry.register("one", folders[1], base, source="test", replace=True),
        lambda: registry.remove("one"),
        lambda: registry.collect_garbage(grace_s=0.0),
        lambda: cold.path(record.version),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    assert registry.resolve("one") == record
    assert set(registry.records()) == {"one"}
    broken.is_away = False
    now[0] += 10
    registry.register("two", folders[1], base, source="test")
    assert cold.path(record.version).is_dir()
    assert registry.remove("one") == record
    registry.close()
    store.close()


def test_what_a_crash_left_goes_after_a_while(machine: Machines, folders: list[Path]) -> None:
    store = machine()
    store.add(folders[0])
    old, new = store.root / "arriving" / "old", store.root / "arriving" / "new"
    for one in (old, new):
        one.mkdir()
        (one / "packed.tar").write_bytes(b"x")
    os.utime(old, (0, 0))
    assert store.sweep() == 1
    assert new.is_dir()
    assert not old.exists()


@given(
    order=st.lists(st.integers(0, CONTENTS - 1), min_size=1, max_size=12),
    room=st.floats(0.5, 5.0),
)
@settings(max_examples=8, deadline=None)
def test_the_cache_keeps_to_its_budget_and_the_newest(
    tmp_path_factory: pytest.TempPathFactory, folders: list[Path], order: list[int], room: float
) -> None:
    """Against a list that is kept by hand, all reads being long ago."""
    root = tmp_path_factory.mktemp("budget")
    objects = Objects("s3://bucket/p", open_files=lambda: in_folder(root / "objects"))
    writer = RemoteStore(objects, Store(root / "writer"))
    versions = [writer.add(one) for one in folders]
    sizes = {one: Store(root / "writer").path(one) for one in versions}
    nbytes = {
        one: sum(file.stat().st_size for file in path.iterdir()) for one, path in sizes.items()
    }
    budget = int(room * nbytes[versions[0]])
    store = RemoteStore(objects, Store(root / "reader"), cache_bytes=budget)
    last_used: dict[str, int] = {}
    for turn, number in enumerate(order):
        version = versions[number]
        store.path(version)
        last_used[version] = turn
        use_long_ago(store, version, 1e6 - turn * 100)
        kept = {one.name for one in (store.root / "versions").iterdir()}
        assert version in kept
        assert len(kept) == 1 or sum(nbytes[one] for one in kept) <= budget
        gone = last_used.keys() - kept
        assert not gone or max(last_used[one] for one in gone) < min(
            last_used[one] for one in kept if one in last_used
        )
    store.close()
    shutil.rmtree(root)
