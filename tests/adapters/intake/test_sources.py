from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterError,
    SourceForbidden,
    SourceUnavailable,
    StoreFull,
    UploadTooLarge,
)
from adapters.intake.sources import Sources

ADAPTER: Mapping[str, bytes] = {
    "adapter_config.json": b'{"peft_type": "HIRA"}',
    "adapter_model.safetensors": bytes(range(256)) * 4,
}
SECRET = b"not for this server"


def write(folder: Path, files: Mapping[str, bytes] = ADAPTER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write(tmp_path / "outside", {**ADAPTER, "config.json": SECRET})


@pytest.fixture
def sources(tmp_path: Path, root: Path) -> Sources:
    return Sources(tmp_path / "staging", [root], max_bytes=1 << 20)


def read(sources: Sources, source: str, *, trusted: bool = False) -> dict[str, bytes]:
    with sources.fetch(source, trusted=trusted) as folder:
        assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(sources: Sources, source: str, *, trusted: bool = False) -> AdapterError:
    """The error of fetching, which leaves no copy behind."""
    with pytest.raises(AdapterError) as caught:
        read(sources, source, trusted=trusted)
    assert list(sources.staging.iterdir()) == []
    return caught.value


def test_a_folder_below_a_root_is_copied_and_the_copy_goes(sources: Sources, root: Path) -> None:
    folder = write(root / "team" / "adapter", {**ADAPTER, "README.md": b"#", "other.py": b"no"})
    with sources.fetch(str(folder)) as copy:
        assert {path.name for path in copy.iterdir()} == {*ADAPTER, "README.md"}
        assert (copy / "adapter_config.json").read_bytes() == ADAPTER["adapter_config.json"]
        assert copy.stat().st_mode & 0o077 == 0
    assert not copy.exists()
    assert (folder / "other.py").exists()


def test_a_folder_outside_every_root_is_forbidden(sources: Sources, outside: Path) -> None:
    assert isinstance(refused(sources, str(outside)), SourceForbidden)


def test_a_folder_whose_name_begins_like_a_root_is_forbidden(
    sources: Sources, tmp_path: Path
) -> None:
    assert isinstance(refused(sources, str(write(tmp_path / "root-of-another"))), SourceForbidden)


def test_without_roots_no_path_is_allowed(tmp_path: Path, root: Path) -> None:
    closed = Sources(tmp_path / "staging")
    assert isinstance(refused(closed, str(write(root / "adapter"))), SourceForbidden)


@pytest.mark.parametrize("way", ["../outside", "x/../../outside", "./../outside"])
def test_dots_do_not_leave_the_root(sources: Sources, root: Path, outside: Path, way: str) -> None:
    (root / "x").mkdir()
    assert isinstance(refused(sources, f"{root}/{way}"), SourceForbidden)


def test_a_relative_path_is_forbidden(
    sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "adapter")
    monkeypatch.chdir(root)
    fault = refused(sources, "adapter")
    assert isinstance(fault, SourceForbidden)
    assert "absolute" in fault.message


def test_a_linked_folder_that_leaves_the_root_is_forbidden(
    sources: Sources, root: Path, outside: Path
) -> None:
    (root / "link").symlink_to(outside)
    (root / "parent").symlink_to(outside.parent)
    for way in ("link", "parent/outside"):
        assert isinstance(refused(sources, f"{root}/{way}"), SourceForbidden)


def test_a_linked_folder_within_the_root_is_followed(sources: Sources, root: Path) -> None:
    write(root / "real")
    (root / "link").symlink_to(root / "real")
    assert read(sources, str(root / "link")) == ADAPTER


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "README.md"])
def test_a_linked_file_is_forbidden(sources: Sources, root: Path, outside: Path, name: str) -> None:
    folder = write(root / "adapter")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / "config.json")
    fault = refused(sources, str(folder))
    assert isinstance(fault, SourceForbidden)
    assert fault.found == name


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.timeout(10)  # opening a pipe for reading waits for a writer, if it is done wrongly
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(sources: Sources, root: Path) -> None:
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        folder = write(root / name)
        (folder / "adapter_config.json").unlink()
        make(folder / "adapter_config.json")
        open_files = len(os.listdir("/proc/self/fd"))
        assert isinstance(refused(sources, str(folder)), SourceForbidden)
        assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("name", ["missing", "adapter/adapter_config.json", "loop", "n" * 300])
def test_what_is_no_folder_is_unavailable(sources: Sources, root: Path, name: str) -> None:
    write(root / "adapter")
    (root / "loop").symlink_to(root / "loop")
    assert isinstance(refused(sources, f"{root}/{name}"), SourceUnavailable)


def test_a_nul_in_a_path_is_unavailable(sources: Sources, root: Path) -> None:
    assert isinstance(refused(sources, f"{root}/a\0b"), SourceUnavailable)


def test_bytes_are_counted_over_all_files(tmp_path: Path, root: Path) -> None:
    folder = write(root / "adapter", {**ADAPTER, "README.md": bytes(100)})
    total = sum(len(content) for content in ADAPTER.values()) + 100
    exact = Sources(tmp_path / "staging", [root], max_bytes=total)
    assert len(read(exact, str(folder))) == 3
    small = Sources(tmp_path / "staging", [root], max_bytes=total - 1)
    assert isinstance(refused(small, str(folder)), UploadTooLarge)


def test_a_pickle_is_brought_along_so_that_the_checks_can_name_it(
    sources: Sources, root: Path
) -> None:
    folder = write(root / "adapter", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
    assert "adapter_model.bin" in read(sources, str(folder))


def test_what_the_operator_names_may_be_anywhere(
    sources: Sources, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outside.parent)
    assert set(read(sources, "outside", trusted=True)) == {*ADAPTER, "config.json"}


def test_a_full_disk_is_the_servers_fault(
    sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write(root / "adapter")
    monkeypatch.setattr(Sources, "_copy", full)
    assert isinstance(refused(sources, str(folder)), StoreFull)


@pytest.mark.parametrize(
    "source",
    [
        "http://host/a",
        "file:///etc",
        "FILE:///etc",
        "gs://bucket/a",
        "HF://org/repo",
        "://",
        "a://",
    ],
)
def test_an_unknown_scheme_is_forbidden_even_to_the_operator(sources: Sources, source: str) -> None:
    assert isinstance(refused(sources, source), SourceForbidden)
    assert isinstance(refused(sources, source, trusted=True), SourceForbidden)


@pytest.mark.parametrize(
    ("source", "setting"),
    [("hf://org/repo", "HIRA_ALLOW_HUB"), ("s3://bucket/folder", "HIRA_ALLOW_S3")],
)
def test_remote_sources_are_off_until_allowed(
    sources: Sources, source: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    fault = refused(sources, source)
    assert isinstance(fault, SourceForbidden)
    assert setting in str(fault.fix)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    fault = refused(Sources(tmp_path / "staging", allow_s3=True), "s3://bucket/folder")
    assert isinstance(fault, SourceUnavailable)
    assert "pip install" in str(fault.fix)


class Hub:
    """In place of ``snapshot_download``: a snapshot on the disk, and the calls made."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.calls: list[dict[str, Any]] = []
        self.fault: Exception | None = None
        self.dry_fault: Exception | None = None

    def __call__(self, repo: str, **options: Any) -> Any:
        self.calls.append({"repo": repo, **options})
        if self.fault is not None:
            raise self.fault
        if options.get("dry_run") and self.dry_fault is not None:
            raise self.dry_fault
        if options.get("dry_run"):
            files = [path for path in self.snapshot.rglob("*") if path.is_file()]
            return [
                SimpleNamespace(file_size=f.stat().st_size, commit_hash="c0ffee") for f in files
            ]
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub extra is missing")
    blobs = write(tmp_path / "cache" / "blobs")
    snapshot = tmp_path / "cache" / "snapshot"
    for folder in (snapshot, snapshot / "sub"):
        folder.mkdir()
        for name in ADAPTER:  # as the hub's cache does
            (folder / name).symlink_to(blobs / name)
    made = Hub(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


@pytest.fixture
def remote(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "staging", allow_hub=True, allow_s3=True, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("source", "revision", "pattern"),
    [
        ("hf://org/repo", None, "adapter_config.json"),
        ("hf://org/repo@v1.0", "v1.0", "adapter_config.json"),
        ("hf://org/repo/sub@main", "main", "sub/adapter_config.json"),
    ],
)
def test_the_hub_gives_the_files_of_one_measured_commit(
    remote: Sources, hub: Hub, source: str, revision: str | None, pattern: str
) -> None:
    assert read(remote, source) == ADAPTER
    planned, fetched = hub.calls
    assert planned["repo"] == fetched["repo"] == "org/repo"
    assert planned["revision"] == revision
    assert fetched["revision"] == "c0ffee"
    assert pattern in planned["allow_patterns"]
    assert planned["allow_patterns"] == fetched["allow_patterns"]


@pytest.mark.parametrize(
    "source",
    [
        "hf://org",
        "hf://org/repo/../../etc",
        "hf://org/repo/./x",
        "hf://org/repo/a/..",
        "hf://",
        "hf://a b/c",
    ],
)
def test_a_malformed_hub_address_is_forbidden(remote: Sources, hub: Hub, source: str) -> None:
    assert isinstance(refused(remote, source), SourceForbidden)
    assert hub.calls == []


def test_a_hub_address_cannot_name_a_local_folder(remote: Sources, hub: Hub, outside: Path) -> None:
    assert isinstance(refused(remote, f"hf://org/repo/{outside}"), SourceForbidden)
    assert hub.calls == []


def test_too_much_on_the_hub_is_refused_before_it_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    small = Sources(tmp_path / "staging", allow_hub=True, max_bytes=100)
    assert isinstance(refused(small, "hf://org/repo"), UploadTooLarge)
    assert [call.get("dry_run") for call in hub.calls] == [True]


def test_without_the_hub_its_cache_is_read(remote: Sources, hub: Hub) -> None:
    from huggingface_hub.errors import DryRunError

    hub.dry_fault = DryRunError("no connection")
    assert read(remote, "hf://org/repo@main") == ADAPTER
    assert hub.calls[-1]["local_files_only"] is True


@pytest.mark.parametrize("fault", [OSError("offline"), ValueError("bad repo id")])
def test_a_hub_that_fails_is_unavailable(remote: Sources, hub: Hub, fault: Exception) -> None:
    hub.fault = fault
    assert isinstance(refused(remote, "hf://org/repo"), SourceUnavailable)


class NoCredentials(Exception):
    """In place of botocore's own."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """An object store by name; a value that begins with "!" is an error when it is read."""
    objects: dict[str, bytes] = {}

    def opened(path: str, mode: str) -> io.BytesIO:
        assert mode == "rb"
        if path not in objects:
            raise FileNotFoundError(path)
        if objects[path] == b"!":
            raise NoCredentials("Unable to locate credentials")
        return io.BytesIO(objects[path])

    def filesystem(_: str) -> SimpleNamespace:
        return SimpleNamespace(open=opened)

    exceptions = ModuleType("botocore.exceptions")
    exceptions.__dict__.update(BotoCoreError=NoCredentials, ClientError=NoCredentials)
    monkeypatch.setitem(sys.modules, "botocore", ModuleType("botocore"))
    monkeypatch.setitem(sys.modules, "botocore.exceptions", exceptions)
    fsspec = ModuleType("fsspec")
    fsspec.__dict__["filesystem"] = filesystem
    monkeypatch.setitem(sys.modules, "fsspec", fsspec)
    return objects


def test_an_object_store_gives_the_files(remote: Sources, bucket: dict[str, bytes]) -> None:
    bucket.update({f"s3://bucket/a/{name}": content for name, content in ADAPTER.items()})
    bucket["s3://bucket/a/other.txt"] = b"no"
    assert read(remote, "s3://bucket/a/") == ADAPTER


def test_an_object_store_that_gives_too_much_is_cut_off(
    tmp_path: Path, bucket: dict[str, bytes]
) -> None:
    bucket["s3://bucket/a/adapter_model.safetensors"] = bytes(200)
    small = Sources(tmp_path / "staging", allow_s3=True, max_bytes=100)
    assert isinstance(refused(small, "s3://bucket/a"), UploadTooLarge)


def test_an_object_store_without_credentials_is_unavailable(
    remote: Sources, bucket: dict[str, bytes]
) -> None:
    bucket["s3://bucket/a/adapter_config.json"] = b"!"
    assert isinstance(refused(remote, "s3://bucket/a"), SourceUnavailable)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_folder_swapped_for_a_link_meanwhile_is_forbidden(
    sources: Sources, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "team" / "outside")
    resolve: Callable[..., Path] = Path.resolve

    def swapped(path: Path, strict: bool = False) -> Path:
        real = resolve(path, strict)
        if path.name == "outside" and not (root / "team").is_symlink():
            (root / "team").rename(root / "old")
            (root / "team").symlink_to(outside.parent)
        return real

    monkeypatch.setattr(Path, "resolve", swapped)
    assert isinstance(refused(sources, str(root / "team" / "outside")), SourceForbidden)


PARTS = st.sampled_from(
    ["..", ".", "", "a", "link", "root", "outside", "/", "~", "a\0", "//", "%2e"]
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(PARTS, max_size=6), scheme=st.sampled_from(["", "hf://", "hf://org/repo"]))
def test_no_spelling_of_a_path_reads_outside_the_root(
    sources: Sources, root: Path, outside: Path, parts: list[str], scheme: str
) -> None:
    if not (root / "link").exists():
        write(root / "a")
        (root / "link").symlink_to(outside)
    for start in (str(root), str(outside), ""):
        try:
            content = read(sources, scheme + "/".join([start, *parts]))
        except AdapterError:
            continue
        assert SECRET not in content.values()
