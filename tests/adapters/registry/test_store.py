from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterNotFound, CorruptFile, StoreFull
from adapters.intake.checkpoint import CONFIG_FILE
from adapters.intake.safetensors_header import TENSOR_FILE
from adapters.registry.store import Store, version_of
from tests.stand.folders import change_config, hira_folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hira_folder(tmp_path_factory.mktemp("store") / "adapter")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(store: Store) -> list[Path]:
    return list((store.root / "staging").iterdir())


def test_what_is_added_is_there_whole(store: Store, adapter: Path) -> None:
    version = store.add(adapter)
    folder = store.path(version)
    for name in (CONFIG_FILE, TENSOR_FILE, "config.json"):
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()
    assert store.versions() == {version}
    assert leftovers(store) == []


def test_a_stamp_holds_until_a_file_changes(store: Store, adapter: Path) -> None:
    """Each change keeps the number of bytes, or the time of modification, or both."""
    version = store.add(adapter)
    path = store.path(version) / TENSOR_FILE
    before, told = store.stamp(version), path.stat()
    assert {name for name, *_ in before} == {entry.name for entry in path.parent.iterdir()}
    path.read_bytes()
    store.touch(version)
    assert store.stamp(version) == before

    def restamped() -> Any:
        os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
        return store.stamp(version)

    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    written = restamped()
    assert written != before
    os.truncate(path, told.st_size - 1)
    cut = restamped()
    assert cut != written
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)
    assert restamped() != cut
    store.remove(version)
    with pytest.raises(AdapterNotFound):
        store.stamp(version)


def test_the_same_content_is_stored_once(store: Store, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    save_file(dict(reversed(load_file(adapter / TENSOR_FILE).items())), copy / TENSOR_FILE)
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    (copy / "README.md").write_text("a card")
    assert store.add(adapter) == store.add(copy)
    assert len(store.versions()) == 1


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_any_changed_byte_of_a_tensor_is_another_version(
    adapter: Path, tmp_path: Path, place: int, change: int
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy", dirs_exist_ok=True)
    raw = bytearray((adapter / TENSOR_FILE).read_bytes())
    body = 8 + int.from_bytes(raw[:8], "little")
    raw[body + place % (len(raw) - body)] ^= change
    (copy / TENSOR_FILE).write_bytes(raw)
    assert version_of(copy) != version_of(adapter)


def test_another_option_or_label_is_another_version(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert version_of(change_config(copy, r=9)) != version_of(adapter)
    again = shutil.copytree(adapter, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    assert version_of(again) != version_of(adapter)


def test_a_full_disk_leaves_nothing_behind(
    store: Store, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StoreFull):
        store.add(adapter)
    assert store.versions() == set()
    assert leftovers(store) == []


def test_the_size_limit_is_kept(tmp_path: Path, adapter: Path) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    store = Store(tmp_path / "store", max_bytes=size + 100)
    store.add(adapter)
    with pytest.raises(StoreFull):
        store.add(hira_folder(tmp_path / "other", seed=1))
    assert len(store.versions()) == 1
    assert store.nbytes() == size


def test_bytes_follow_what_comes_and_goes(store: Store, adapter: Path, tmp_path: Path) -> None:
    other = hira_folder(tmp_path / "other", rank=7)
    assert store.nbytes() == 0
    first, second = store.add(adapter), store.add(other)
    both = store.nbytes()
    assert both == Store(store.root).nbytes() > 0
    store.remove(first)
    rest = store.nbytes()
    assert 0 < rest == Store(store.root).nbytes() < both
    store.remove(second)
    assert store.nbytes() == 0
    store.add(adapter)
    assert store.nbytes() == both - rest


def test_what_is_stored_already_needs_no_room(tmp_path: Path, adapter: Path) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    store = Store(tmp_path / "store", max_bytes=size)
    assert store.add(adapter) == store.add(adapter)


@pytest.mark.parametrize("missing", [CONFIG_FILE, TENSOR_FILE, None])
def test_a_damaged_entry_is_mended_by_adding_it_again(
    store: Store, adapter: Path, missing: str | None
) -> None:
    version = store.add(adapter)
    if missing is not None:
        (store.path(version) / missing).unlink()
        assert not store.has(version)
    else:
        (store.path(version) / TENSOR_FILE).write_bytes(b"")
    assert store.add(adapter) == version
    assert [one for one in store.versions() if not store.is_sound(one)] == []


def test_removal_waits_for_the_grace(store: Store, adapter: Path) -> None:
    version = store.add(adapter)
    assert not store.remove(version, idle_s=60)
    assert store.has(version)
    old = time.time() - 61
    os.utime(store.path(version), (old, old))
    assert store.remove(version, idle_s=60)
    assert not store.has(version)
    assert not store.remove(version)
    assert leftovers(store) == []


@pytest.mark.parametrize("version", ["", "..", "../staging", "a" * 32, "A" * 32, "a/b"])
def test_a_version_that_is_not_there_is_an_error(store: Store, version: str) -> None:
    assert not store.has(version)
    with pytest.raises(AdapterNotFound):
        store.path(version)


def test_what_an_interrupted_writer_left_is_swept(store: Store, adapter: Path) -> None:
    version = store.add(adapter)
    shutil.copytree(adapter, store.root / "staging" / "half")
    assert store.sweep() == 1
    assert leftovers(store) == []
    assert store.versions() == {version}


def test_damage_is_found(store: Store, adapter: Path, tmp_path: Path) -> None:
    version = store.add(adapter)
    store.add(hira_folder(tmp_path / "other", seed=1))
    assert [one for one in store.versions() if not store.is_sound(one)] == []
    path = store.path(version) / TENSOR_FILE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert [one for one in store.versions() if not store.is_sound(one)] == [version]


def test_bytes_that_changed_are_found_when_they_are_read(store: Store, adapter: Path) -> None:
    version = store.add(adapter)
    assert store.sound_path(version) == store.path(version)
    tensors = store.path(version) / TENSOR_FILE
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1  # one bit of the last tensor
    tensors.chmod(0o600)
    tensors.write_bytes(content)
    with pytest.raises(CorruptFile, match="have changed"):
        store.sound_path(version)
    store.add(adapter)  # what the error tells people to do
    assert store.sound_path(version) == store.path(version)


def test_many_at_once_do_not_overrun_the_limit(tmp_path: Path) -> None:
    folders = [hira_folder(tmp_path / str(seed), seed=seed) for seed in range(4)]
    size = sum(one.stat().st_size for one in folders[0].iterdir())
    # One object each, as processes have.
    stores = [Store(tmp_path / "store", int(size * 1.5)) for _ in folders]
    barrier = threading.Barrier(len(folders))
    outcomes: list[str] = []
    real = Store._check_room

    def check_room(self: Store, folder: Path) -> None:
        real(self, folder)
        if folder.parent != self._staging:  # all have looked before anybody copies
            barrier.wait(20)

    def add(store: Store, folder: Path) -> None:
        try:
            store.add(folder)
        except StoreFull:
            outcomes.append("full")
        else:
            outcomes.append("stored")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_check_room", check_room)
        threads = [
            threading.Thread(target=add, args=pair) for pair in zip(stores, folders, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["full", "full", "full", "stored"]
    assert stores[0].nbytes() <= int(size * 1.5)
    assert leftovers(stores[0]) == []
