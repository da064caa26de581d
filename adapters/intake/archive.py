"""Adapter files out of an uploaded archive, none but those, and never a byte beside the target.

Only the files of an adapter are taken, from the top of the archive or from one folder in it.
Every member is looked at before any is written. What the files hold is checked by ``checkpoint``.
"""

from __future__ import annotations

import errno
import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from adapters.errors import AdapterFaults, CorruptFile, MissingTensors, UnsafeFormat, UploadTooLarge
from adapters.intake.checkpoint import CONFIG_FILE, STORED_FILES
from adapters.intake.conversation import CONVERSATION_FILES, NESTED_TEMPLATES
from adapters.intake.pooling import NESTED
from adapters.intake.safetensors_header import TENSOR_FILE, pickle_refused

# By their path in an adapter's folder: the flat names under which they are looked at.
WANTED: dict[str, str] = (
    {name: name for name in (*STORED_FILES, *CONVERSATION_FILES)}
    | dict(NESTED)
    | dict(NESTED_TEMPLATES)
)
MAX_MEMBERS = 1_000
MAX_RATIO = 200  # unpacked to packed; safetensors hardly shrink
COPY_CHUNK_BYTES = 1 << 20
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack without bound
_ENCRYPTED = 0x1
_GZIP_START = b"\x1f\x8b"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    nbytes: int
    is_folder: bool
    is_file: bool  # a regular one: no link, device or pipe
    handle: zipfile.ZipInfo | tarfile.TarInfo


def unpack(archive: Path, target: Path, *, max_bytes: int) -> Path:
    """Take the files of an adapter out of a zip, tar or tar.gz archive.

    Memory stays within a few ``COPY_CHUNK_BYTES``, whatever the archive claims or unpacks to.

    Args:
        archive: On disk.
        target: An empty folder; the files are written flat into it.
        max_bytes: Most bytes of all members together, unpacked.

    Returns:
        ``target``.

    Raises:
        UnsafeFormat: A member would leave the archive, is a link, device or pickle, or is packed
            in a way that is not read.
        UploadTooLarge: Too many members, or too many bytes.
        CorruptFile: It is no such archive, or it is damaged.
        MissingTensors: It holds no adapter.
        AdapterFaults: Several of these.
    """
    with _opened(archive) as opened:
        limit = min(max_bytes, max(archive.stat().st_size, 4096) * MAX_RATIO)
        chosen = _adapter_members(_members(opened, limit))
        left = limit
        for name, member in chosen.items():
            left -= _extract(opened, member, target / name, left)
    return target


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


def _members(opened: zipfile.ZipFile | tarfile.TarFile, max_bytes: int) -> list[_Member]:
    members: list[_Member] = []
    total = 0
    for handle in opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened:
        if len(members) == MAX_MEMBERS:
            raise UploadTooLarge(
                "The archive has too many members.", expected=f"at most {MAX_MEMBERS}"
            )
        members.append(_member_of(handle))
        total += max(members[-1].nbytes, 0)
        if total > max_bytes:  # before the next header is looked for behind all these bytes
            raise UploadTooLarge(
                "The archive unpacks to too much.",
                found=f"more than {total} bytes",
                expected=f"at most {max_bytes} bytes, {MAX_RATIO} times the archive or the limit",
            )
    if isinstance(opened, tarfile.TarFile):
        _check_end(opened)
    return members


def _check_end(opened: tarfile.TarFile) -> None:
    """Tell the end of an archive from damage: tarfile takes a broken header for the end too."""
    assert opened.fileobj is not None
    opened.fileobj.seek(opened.offset)
    if opened.fileobj.read(COPY_CHUNK_BYTES)[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise CorruptFile(
            "The archive is damaged, or ends too early.",
            found=f"no end mark at byte {opened.offset}",
            expected="a block of zeros after the last member",
            fix="Pack or upload it again.",
        )


def _member_of(handle: zipfile.ZipInfo | tarfile.TarInfo) -> _Member:
    if isinstance(handle, tarfile.TarInfo):
        return _Member(handle.name, handle.size, handle.isdir(), handle.isreg(), handle)
    kind = stat.S_IFMT(handle.external_attr >> 16)
    return _Member(
        handle.filename,
        handle.file_size,
        handle.is_dir(),
        not handle.is_dir() and kind in (0, stat.S_IFREG),
        handle,
    )


def _adapter_members(members: list[_Member]) -> dict[str, _Member]:
    faults = [fault for member in members if (fault := _danger(member)) is not None]
    if faults:
        raise faults[0] if len(faults) == 1 else AdapterFaults(faults[:8])
    configs = [PurePosixPath(m.name) for m in members if PurePosixPath(m.name).name == CONFIG_FILE]
    folders = {path.parent for path in configs if len(path.parts) <= 2}
    if len(folders) != 1:
        raise MissingTensors(
            "The archive holds no adapter, or several.",
            found=f"{len(folders)} folders with an {CONFIG_FILE}",
            expected=f"one, at the top or one folder down, with its {TENSOR_FILE}",
        )
    (folder,) = folders
    chosen: dict[str, _Member] = {}
    for member in members:
        path = PurePosixPath(member.name)
        if not member.is_file or not path.is_relative_to(folder):
            continue
        name = WANTED.get(str(path.relative_to(folder)))
        if name is None:
            continue
        if name in chosen:
            raise CorruptFile(f"The archive holds {name} twice.", expected="once")
        chosen[name] = member
    return chosen


def _danger(member: _Member) -> UnsafeFormat | None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    shown = repr(member.name)[:120]
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or ":" in member.name:
        return UnsafeFormat(
            "A member of the archive would leave it.", found=shown, expected="plain relative names"
        )
    if not (member.is_file or member.is_folder):
        return UnsafeFormat(
            "A member of the archive is not a plain file.",
            found=shown,
            expected="files and folders; no links, devices or pipes",
            fix="Pack the files themselves.",
        )
    if isinstance(member.handle, zipfile.ZipInfo) and (
        member.handle.compress_type not in _ZIP_METHODS or member.handle.flag_bits & _ENCRYPTED
    ):
        return UnsafeFormat(
            "A member of the archive is encrypted, or packed by a method that is not read.",
            found=f"{shown}, method {member.handle.compress_type}",
            expected="stored or deflated, without a password",
        )
    if path.name.startswith("adapter_model") and path.suffix in _PICKLES:
        return pickle_refused(shown)
    return None


def _extract(
    opened: zipfile.ZipFile | tarfile.TarFile, member: _Member, target: Path, max_bytes: int
) -> int:
    """Write one member; returns its bytes. The sizes in the archive's own table are not trusted."""
    written = 0
    with _reader(opened, member) as reader, target.open("xb") as writer:
        while chunk := reader.read(COPY_CHUNK_BYTES):
            written += len(chunk)
            if written > max_bytes or written > member.nbytes:
                raise UploadTooLarge(
                    f"{target.name} unpacks to more than the archive says.",
                    expected=f"at most {min(max_bytes, member.nbytes)} bytes",
                )
            writer.write(chunk)
    return written


class _Bounded(io.RawIOBase):
    """A file that refuses to read much at once: an archive's own lists are read whole otherwise."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        content = self._file.read(
            COPY_CHUNK_BYTES + 1 if size < 0 else min(size, COPY_CHUNK_BYTES + 1)
        )
        if len(content) > COPY_CHUNK_BYTES:
            raise UploadTooLarge(
                "The archive's list of members is too long.",
                found=f"more than {COPY_CHUNK_BYTES} bytes in one piece",
                expected=f"at most {COPY_CHUNK_BYTES}",
            )
        return content

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    try:
        with archive.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(_Bounded(file)) as unzipped:
                    yield unzipped
                return
            file.seek(0)
            packed = file.read(2) == _GZIP_START
            file.seek(0)
            with (
                gzip.GzipFile(fileobj=file) if packed else nullcontext(file) as plain,
                tarfile.TarFile(fileobj=_Bounded(cast("IO[bytes]", plain))) as untarred,
            ):
                yield untarred
    except (
        *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
        *(NotImplementedError, RuntimeError, ValueError, OverflowError),
    ) as cause:
        raise _unreadable(cause) from cause
    except OSError as cause:
        if cause.errno != errno.EINVAL:  # an index that points before the file begins
            raise
        raise _unreadable(cause) from cause


@contextmanager
def _reader(opened: zipfile.ZipFile | tarfile.TarFile, member: _Member) -> Iterator[IO[bytes]]:
    if isinstance(opened, zipfile.ZipFile):
        assert isinstance(member.handle, zipfile.ZipInfo)
        with opened.open(member.handle) as reader:
            yield reader
        return
    assert isinstance(member.handle, tarfile.TarInfo)
    extracted = opened.extractfile(member.handle)
    assert extracted is not None  # only regular files come here
    with extracted as reader:
        yield reader


def _unreadable(cause: Exception) -> CorruptFile:
    return CorruptFile(
        "The archive cannot be read.",
        found=str(cause)[:120] or type(cause).__name__,
        expected="a zip, tar or tar.gz archive, without a password",
    )
