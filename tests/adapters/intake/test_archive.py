from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    CorruptFile,
    MissingTensors,
    UnsafeFormat,
    UploadTooLarge,
)
from adapters.intake.archive import MAX_MEMBERS, WANTED, is_archive, unpack

LIMIT_BYTES = 1 << 20
ADAPTER: Mapping[str, bytes] = {
    "adapter_config.json": b'{"peft_type": "HIRA"}',
    "adapter_model.safetensors": bytes(range(256)) * 4,
}
Packer = Callable[[Path, Mapping[str, bytes]], Path]


def make_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def make_tar(path: Path, files: Mapping[str, bytes], *extra: tarfile.TarInfo) -> Path:
    # "w" and "w:gz" spelled apart: tarfile's types know only literals.
    packed = path.name.endswith("gz")
    with tarfile.open(path, "w:gz") if packed else tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return path


def pack(kind: str, folder: Path, files: Mapping[str, bytes]) -> Path:
    maker: Packer = make_zip if kind == "zip" else make_tar
    return maker(folder / f"upload.{kind}", files)


def everything(root: Path) -> dict[str, bytes | None]:
    """Every path below ``root``, with its bytes if it is a plain file."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "room" / "target"
    folder.mkdir(parents=True)
    return folder


def refused(archive: Path, target: Path, max_bytes: int = LIMIT_BYTES) -> AdapterError:
    """The error of unpacking; nothing may appear beside the target, and no other name in it."""
    outside = everything(target.parents[1])
    with pytest.raises(AdapterError) as caught:
        unpack(archive, target, max_bytes=max_bytes)
    inside = {path.name for path in target.iterdir()}
    assert inside <= set(WANTED)
    after = everything(target.parents[1])
    assert {name: after[name] for name in after if "target/" not in name} == outside
    return caught.value


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("folder", ["", "./", "my-adapter/"])
def test_the_files_of_an_adapter_are_taken_and_no_others(
    tmp_path: Path, target: Path, kind: str, folder: str
) -> None:
    extra = {
        "training_args.bin": b"x",
        "checkpoint-1/adapter_config.json": b"{}",
        "README.md": b"#",
    }
    files = {f"{folder}{name}": content for name, content in {**ADAPTER, **extra}.items()}
    if folder == "my-adapter/":
        files["other.txt"] = b"beside"
    else:
        del files[f"{folder}checkpoint-1/adapter_config.json"]
    assert unpack(pack(kind, tmp_path, files), target, max_bytes=LIMIT_BYTES) == target
    assert everything(target) == {**ADAPTER, "README.md": b"#"}


@pytest.mark.parametrize(
    ("name", "taken"),
    [("a.zip", True), ("a.tar", True), ("a.tar.gz", True), ("a.tgz", True), ("a.tar.xz", False)]
    + [(name, False) for name in WANTED],
)
def test_archives_are_known_by_their_names(name: str, taken: bool) -> None:
    assert is_archive(name) is taken


ESCAPES = [
    "../evil.txt",
    "a/../../evil.txt",
    "../target2/adapter_config.json",
    "/tmp/evil.txt",
    "//etc/evil",
    "..\\evil.txt",
    "a\\..\\..\\evil",
    "\\evil",
    "C:\\evil",
    "C:evil",
]


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
@pytest.mark.parametrize("name", ESCAPES)
def test_a_member_that_would_leave_the_archive_refuses_it_whole(
    tmp_path: Path, target: Path, kind: str, name: str
) -> None:
    fault = refused(pack(kind, tmp_path, {**ADAPTER, name: b"evil"}), target)
    assert isinstance(fault, UnsafeFormat)
    assert repr(name)[:40] in str(fault.found)
    assert list(target.iterdir()) == []


def test_several_dangers_are_reported_together(tmp_path: Path, target: Path) -> None:
    fault = refused(pack("zip", tmp_path, {**ADAPTER, "../a": b"", "/b": b""}), target)
    assert isinstance(fault, AdapterFaults)
    assert len(fault.faults) == 2


def special(
    kind: bytes, name: str = "adapter_model.safetensors", link: str = ""
) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = link
    return member


@pytest.mark.parametrize("packed", ["tar", "tgz"])
@pytest.mark.parametrize(
    "member",
    [
        special(tarfile.SYMTYPE, link="/etc/passwd"),
        special(tarfile.SYMTYPE, link="adapter_config.json"),
        special(tarfile.LNKTYPE, link="adapter_config.json"),
        special(tarfile.CHRTYPE),
        special(tarfile.BLKTYPE),
        special(tarfile.FIFOTYPE),
        special(tarfile.SYMTYPE, name="folder", link="/tmp"),
    ],
    ids=["symlink-out", "symlink-in", "hardlink", "char", "block", "fifo", "symlinked-folder"],
)
def test_links_devices_and_pipes_are_refused(
    tmp_path: Path, target: Path, member: tarfile.TarInfo, packed: str
) -> None:
    config = {"adapter_config.json": ADAPTER["adapter_config.json"]}
    fault = refused(make_tar(tmp_path / f"a.{packed}", config, member), target)
    assert isinstance(fault, UnsafeFormat)
    assert list(target.iterdir()) == []


def test_a_symlink_in_a_zip_is_refused(tmp_path: Path, target: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"adapter_config.json": b"{}"})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("adapter_model.safetensors")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert isinstance(refused(path, target), UnsafeFormat)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x/adapter_model.pt", "adapter_model.pkl"])
def test_a_pickled_adapter_is_refused(tmp_path: Path, target: Path, name: str) -> None:
    fault = refused(pack("zip", tmp_path, {**ADAPTER, name: b"\x80\x04."}), target)
    assert isinstance(fault, UnsafeFormat)
    assert "pickle" in fault.message


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path, target: Path, kind: str) -> None:
    archive = pack(kind, tmp_path, {**ADAPTER, "padding": bytes(8 << 20)})
    assert archive.stat().st_size < (8 << 20) / 200
    fault = refused(archive, target, max_bytes=1 << 30)
    assert isinstance(fault, UploadTooLarge)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_more_bytes_than_the_limit_are_refused(tmp_path: Path, target: Path, kind: str) -> None:
    archive = pack(kind, tmp_path, {**ADAPTER, "README.md": os.urandom(5_000)})
    fault = refused(archive, target, max_bytes=4_096)
    assert isinstance(fault, UploadTooLarge)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("claim", [1, 4_095])
def test_a_zip_that_lies_about_its_sizes_writes_no_more_than_it_says(
    tmp_path: Path, target: Path, claim: int
) -> None:
    path = make_zip(tmp_path / "a.zip", {**ADAPTER, "README.md": bytes(4_096)})
    raw = path.read_bytes()
    place = raw.rfind(b"PK\x01\x02")  # the last entry of the central directory
    assert struct.unpack_from("<I", raw, place + 24) == (4_096,)
    path.write_bytes(raw[: place + 24] + struct.pack("<I", claim) + raw[place + 28 :])
    assert isinstance(refused(path, target), CorruptFile | UploadTooLarge)
    assert (target / "README.md").stat().st_size <= claim


def test_a_tar_that_claims_more_than_it_holds_is_corrupt(tmp_path: Path, target: Path) -> None:
    member = tarfile.TarInfo("README.md")
    member.size = 100_000
    path = make_tar(tmp_path / "a.tar", ADAPTER)
    whole = path.read_bytes().rstrip(b"\0")
    content = whole + bytes(-len(whole) % 512) + member.tobuf() + b"short"
    path.write_bytes(content)
    assert isinstance(refused(path, target), CorruptFile)


def test_too_many_members_are_refused(tmp_path: Path, target: Path) -> None:
    files = {**ADAPTER, **{f"empty-{index}": b"" for index in range(MAX_MEMBERS)}}
    for kind in ("zip", "tar"):
        fault = refused(pack(kind, tmp_path, files), target)
        assert isinstance(fault, UploadTooLarge)
        assert "members" in fault.message


def test_a_list_of_members_that_fills_memory_is_refused(tmp_path: Path, target: Path) -> None:
    """tarfile reads an extended header whole, and zipfile the central directory."""
    name = tarfile.TarInfo("././@LongLink")
    name.type = tarfile.GNUTYPE_LONGNAME
    name.size = 64 << 20
    tarred = tmp_path / "a.tgz"
    with gzip.open(tarred, "wb") as writer:
        writer.write(name.tobuf() + bytes(name.size))
    zipped = make_zip(tmp_path / "a.zip", {f"{'n' * 200}{index}": b"" for index in range(8_000)})
    for archive in (tarred, zipped):
        fault = refused(archive, target, max_bytes=1 << 30)
        assert isinstance(fault, UploadTooLarge)
        assert "list of members" in fault.message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_methods_that_unpack_without_bound_are_refused(
    tmp_path: Path, target: Path, method: int
) -> None:
    fault = refused(make_zip(tmp_path / "a.zip", ADAPTER, method), target)
    assert isinstance(fault, UnsafeFormat | AdapterFaults)
    assert fault.code == "unsafe_format"


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": b"nothing else"},
        {"a/b/adapter_config.json": b"{}"},
        {f"{name}/adapter_config.json": b"{}" for name in "ab"},
        {**ADAPTER, "second/adapter_config.json": b"{}"},
    ],
    ids=["empty", "no-config", "two-folders-down", "two-adapters", "top-and-folder"],
)
def test_an_archive_without_exactly_one_adapter_is_refused(
    tmp_path: Path, target: Path, kind: str, files: Mapping[str, bytes]
) -> None:
    assert isinstance(refused(pack(kind, tmp_path, files), target), MissingTensors)


def test_a_member_that_comes_twice_is_refused(tmp_path: Path, target: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {**ADAPTER, "./adapter_config.json": b"{}"})
    fault = refused(path, target)
    assert isinstance(fault, CorruptFile)
    assert "twice" in fault.message


def test_an_encrypted_zip_is_refused(tmp_path: Path, target: Path) -> None:
    path = make_zip(tmp_path / "a.zip", ADAPTER)
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = raw.find(mark)
        while place >= 0:
            raw[place + offset] |= 1
            place = raw.find(mark, place + 1)
    path.write_bytes(raw)
    fault = refused(path, target)
    assert isinstance(fault, AdapterFaults)
    assert fault.code == "unsafe_format"
    assert "encrypted" in fault.message


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_a_truncated_archive_is_refused_wherever_it_ends(
    tmp_path: Path, target: Path, kind: str
) -> None:
    archive = pack(kind, tmp_path, {**ADAPTER, "README.md": os.urandom(700)})
    raw = archive.read_bytes()
    # Behind the last member a tar only has its end mark and padding.
    end = len(raw) if kind != "tar" else -(-len(raw.rstrip(b"\0")) // 512) * 512
    for length in sorted({*range(0, end, end // 60), *range(512, end, 512), end - 1}):
        archive.write_bytes(raw[:length])
        assert isinstance(refused(archive, target), CorruptFile | MissingTensors)
        for left in target.iterdir():
            left.unlink()


def test_a_damaged_header_in_a_tar_is_not_taken_for_its_end(tmp_path: Path, target: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {**ADAPTER, "config.json": b"{}"})
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"config.json")] ^= 1
    path.write_bytes(raw)
    assert isinstance(refused(path, target), CorruptFile)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x1f\x8b", b"not an archive at all" * 100])
def test_what_is_no_archive_is_corrupt(tmp_path: Path, target: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    assert isinstance(refused(tmp_path / "a.zip", target), CorruptFile)


NAMES = st.one_of(
    st.sampled_from([*WANTED, "a", "..", ".", "", "/", "adapter_model.bin", *ESCAPES]),
    st.text("ab./\\:é\n", max_size=12),
    st.lists(st.sampled_from([*WANTED, "..", ".", "a"]), max_size=4).map("/".join),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["zip", "tar", "tgz"]),
    files=st.dictionaries(NAMES.filter(bool), st.binary(max_size=64), max_size=5),
    with_adapter=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=3),
)
def test_nothing_is_written_but_the_four_files_in_the_target(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    files: dict[str, bytes],
    with_adapter: bool,
    flips: list[tuple[int, int]],
) -> None:
    room = tmp_path_factory.mktemp("room")
    target = room / "deep" / "target"
    target.mkdir(parents=True)
    archive = pack(kind, room, {**(ADAPTER if with_adapter else {}), **files})
    raw = bytearray(archive.read_bytes())
    for place, bits in flips:
        raw[place % len(raw)] ^= bits
    archive.write_bytes(raw)
    before = everything(room)
    try:
        unpack(archive, target, max_bytes=LIMIT_BYTES)
    except AdapterError:
        pass
    else:
        assert (target / "adapter_config.json").is_file()
    after = everything(room)
    written = {Path(name) for name in after} - {Path(name) for name in before}
    assert written <= {Path("deep/target") / name for name in WANTED}
    assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())
    assert all(after[name] == content for name, content in before.items())


def test_an_index_that_points_before_the_file_is_corrupt(tmp_path: Path) -> None:
    archive = pack("zip", tmp_path, ADAPTER)
    raw = bytearray(archive.read_bytes())
    at = raw.rfind(b"PK\x05\x06") + 16  # where the index begins, as the end of the file says
    begins = int.from_bytes(raw[at : at + 4], "little")
    raw[at : at + 4] = (begins + 10).to_bytes(4, "little")
    archive.write_bytes(raw)
    (target := tmp_path / "target").mkdir()
    with pytest.raises(CorruptFile, match="cannot be read"):
        unpack(archive, target, max_bytes=LIMIT_BYTES)
