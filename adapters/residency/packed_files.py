"""Adapters on disk as they lie in memory: in the compute dtype, checked, in one piece.

    <folder>/<version>-<layout>.packed   one adapter as one kind of device takes it

Such a file is made from the stored adapter when that is first loaded, and can be deleted at any
time. It is used only while the stored files are those that were checked when it was made (by
``Store.stamp``), and its own bytes are held against a checksum after they have been read, in the
memory that is served from. So a damaged one is never served: it is deleted, and the stored adapter
read as if it had not been there.

The bytes are read, not mapped: a mapped file that is cut ends the process that touches it, and one
that is written to changes answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Final

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from adapters.errors import AdapterError
from adapters.intake.checkpoint import AdapterWeights, Numbers
from adapters.intake.file_names import Stamp
from adapters.intake.safetensors_header import SAFETENSORS_DTYPES
from adapters.residency.packing import (
    PackedAdapter,
    PackedImage,
    Place,
    Places,
    packed_in,
    views_in,
)

_MAGIC: Final = b"HIRAPK01"  # its digits grow with every change of what is in a file
_START: Final = struct.Struct("<8sII")  # magic, bytes of the header, its CRC-32
_PACKED_HEADER_BYTES_MAX: Final = 16 << 20
_SUFFIX: Final = ".packed"
_UNFINISHED: Final = ".part"
_PACKED_NAME: Final = re.compile(r"([0-9a-f]{32})-[a-z0-9]+\.packed")
_UNFINISHED_KEPT_S: Final = 3600.0
# A file system may keep times by the second or two, so a file that is younger may change once more
# without a trace.
SETTLED_S: Final = 2.0
_FREE_SHARE: Final = 0.05  # of the disk, which is left to what cannot be made again
_DTYPES: Final = {str(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}

logger = logging.getLogger(__name__)

_Spot = tuple[NonNegativeInt, tuple[NonNegativeInt, ...], bool]


class _Header(BaseModel):
    """What a file says of itself; its checksum has been compared before this is read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: str
    dtype: str
    stamp: tuple[tuple[str, int, int, int, int], ...]
    elements: NonNegativeInt
    places: dict[str, tuple[_Spot, _Spot, _Spot | None]]
    head: dict[str, tuple[str, tuple[NonNegativeInt, ...]]]
    nonzero: NonNegativeInt
    zero_sides: tuple[str, ...]
    crc: NonNegativeInt


class PackedFiles:
    """The packed files of one store, for one compute dtype and kind of device. Safe in threads, and
    beside other processes that use the folder.

    Args:
        folder: Made when it is first written to.
        dtype: Of factors.
        b_by_column: As for ``pack_adapter``.
        pinned: Whether what is read goes into page-locked memory.
        max_bytes: Of all files in the folder; beyond it those used longest ago are deleted.
        stamp: ``Store.stamp``.
        load_with: The checked adapter of a version, with these numbers in place of its own.
        settled_s: Seconds after which a stored file that has not changed is taken as it is; None:
            SETTLED_S.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        b_by_column: bool,
        pinned: bool,
        max_bytes: int,
        stamp: Callable[[str], Stamp],
        load_with: Callable[[str, Numbers], AdapterWeights],
        settled_s: float | None = None,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.stamp = stamp
        self._dtype = dtype
        self._pinned = pinned
        self._load_with = load_with
        self._settled_s = SETTLED_S if settled_s is None else settled_s
        kind = str(dtype).removeprefix("torch.")
        self._ending = f"-{kind}{'columns' if b_by_column else ''}{_SUFFIX}"
        self._lock = Lock()  # of the two below
        self._sizes: dict[str, int] | None = None  # by file name; None: not looked at yet
        self._told: str | None = None  # why none can be made, as last logged

    def read(self, version: str) -> PackedAdapter | None:
        """The adapter, bit by bit as ``pack_adapter`` made it; None where there is no file that can
        be used: then the stored adapter is to be read, which also says what is wrong with it."""
        path = self._path(version)
        try:
            stamp = self.stamp(version)
            with path.open("rb", buffering=0) as file:
                header, buffer, rest = self._read_checked(file, version, stamp)
            packed = self._unpacked(version, header, buffer, rest)
            if self.stamp(version) != stamp:
                return None  # what was read beside the numbers may be of either state
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (AdapterError, _Outdated):
            return None  # a later file is written over it
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: torch's
            logger.warning(
                "The packed file %s is damaged (%s): it is made anew from the stored adapter.",
                path,
                error,
            )
            self._delete([path.name])
            return None
        return packed

    def write(self, version: str, image: PackedImage, stamp: Stamp) -> None:
        """Keep an adapter that was read and checked; what goes wrong is logged, and harmless.

        Args:
            version: Of the adapter.
            image: Of it.
            stamp: As it was before the adapter was read.
        """
        try:
            if self.stamp(version) != stamp or not self._is_settled(stamp):
                return
            header, parts = _encoded(version, image, stamp)
            size = len(header) + sum(len(part) for part in parts)
            if size > self.max_bytes or not self._has_room(size):
                return
            self._publish(self._path(version), [header, *parts])
        except (OSError, AdapterError) as error:
            self._tell(f"a packed file could not be written: {error}")
            return
        self._tell(None)
        self._count(self._path(version).name, size)

    def keep_only(self, versions: Collection[str]) -> None:
        """Delete the files of all other versions, of whatever dtype."""
        with self._lock:
            others = [name for name in self._known() if name[:32] not in versions]
        self._delete(others)

    def nbytes(self) -> int:
        """Of all files in the folder, as far as this process knows."""
        with self._lock:
            return sum(self._known().values())

    def _path(self, version: str) -> Path:
        return self.folder / f"{version}{self._ending}"

    def _read_checked(
        self, file: BinaryIO, version: str, stamp: Stamp
    ) -> tuple[_Header, torch.Tensor, bytearray]:
        """The header, the numbers of the factors and the bytes of the head, in their own memory."""
        magic, length, crc = _START.unpack(_exactly(file, _START.size))
        if magic != _MAGIC or length > _PACKED_HEADER_BYTES_MAX:
            raise ValueError("it does not begin as a packed file of this release")
        raw = _exactly(file, length)
        if zlib.crc32(raw) != crc:
            raise ValueError("its header has changed")
        header = _Header.model_validate_json(raw)
        if header.stamp != stamp:
            raise _Outdated
        if header.version != version or header.dtype != str(self._dtype):
            raise ValueError("it is of another adapter or dtype")
        rest = bytearray(sum(_nbytes(*one) for one in header.head.values()))
        size = _START.size + length + header.elements * self._dtype.itemsize + len(rest)
        if os.fstat(file.fileno()).st_size != size:
            raise ValueError(f"it has other than {size} bytes")
        buffer = torch.empty(header.elements, dtype=self._dtype, pin_memory=self._pinned)
        target = _memory_of(buffer)
        _read_into(file, target)
        _read_into(file, memoryview(rest))
        if zlib.crc32(rest, zlib.crc32(target)) != header.crc:
            raise ValueError("its numbers have changed")
        return header, buffer, rest

    def _unpacked(
        self, version: str, header: _Header, buffer: torch.Tensor, rest: bytearray
    ) -> PackedAdapter:
        places: dict[str, Places] = {
            path: (Place(*a), Place(*b), None if bias is None else Place(*bias))
            for path, (a, b, bias) in header.places.items()
        }
        head: dict[str, torch.Tensor] = {}
        start = 0
        for name, (dtype, shape) in header.head.items():
            stop = start + _nbytes(dtype, shape)
            # A bytearray of its own each: a task head may outlive the adapter's others.
            part = rest[start:stop]
            flat = torch.frombuffer(part, dtype=_DTYPES[dtype]) if part else torch.empty(0)
            head[name] = flat.to(_DTYPES[dtype]).reshape(shape)
            start = stop
        numbers = Numbers(views_in(buffer, places), head, header.nonzero, header.zero_sides)
        return packed_in(self._load_with(version, numbers), buffer, places)

    def _is_settled(self, stamp: Stamp) -> bool:
        youngest_ns = max(max(mtime, ctime) for *_, mtime, ctime in stamp)
        return time.time() - youngest_ns / 1e9 >= self._settled_s

    def _has_room(self, size: int) -> bool:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        if disk.free - size >= disk.total * _FREE_SHARE:
            return True
        self._tell(f"less than {_FREE_SHARE:.0%} of the disk of {self.folder} are free")
        return False

    def _publish(self, path: Path, parts: list[bytes | memoryview]) -> None:
        """All of a file at once. It is not synced: what a crash leaves of it is found out."""
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            with unfinished.open("xb", buffering=0) as file:
                for part in parts:
                    done = 0
                    while done < len(part):
                        done += file.write(memoryview(part)[done:])
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _count(self, name: str, size: int) -> None:
        """A file was written; where there are too many bytes now, those used longest ago go."""
        with self._lock:
            known = self._known()
            known[name] = size
            if sum(known.values()) <= self.max_bytes:
                return
        found = sorted(self._scanned(), key=lambda one: one[2])
        excess = sum(size for _, size, _ in found) - self.max_bytes
        doomed: list[str] = []
        for other, other_size, _ in found:
            if excess <= 0:
                break
            if other != name:
                doomed.append(other)
                excess -= other_size
        gone = set(doomed)
        with self._lock:
            self._sizes = {other: size for other, size, _ in found if other not in gone}
        self._delete(doomed)

    def _known(self) -> dict[str, int]:
        """Bytes by file name; with the lock held."""
        if self._sizes is None:
            self._sizes = {name: size for name, size, _ in self._scanned()}
        return self._sizes

    def _scanned(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and last use of every file; what was never finished is deleted."""
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                told = entry.stat()
                if _PACKED_NAME.fullmatch(entry.name):
                    yield entry.name, told.st_size, told.st_mtime
                elif (
                    entry.name.endswith(_UNFINISHED)
                    and time.time() - told.st_mtime > _UNFINISHED_KEPT_S
                ):
                    os.unlink(entry.path)

    def _delete(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
            with self._lock:
                self._known().pop(name, None)

    def _tell(self, obstacle: str | None) -> None:
        """Log why no files can be made, once as long as that does not change."""
        kind = None if obstacle is None else obstacle.partition(":")[0]
        with self._lock:
            is_new, self._told = kind != self._told, kind
        if is_new and obstacle is not None:
            logger.warning("Adapters are read from the store in full, because %s.", obstacle)


class _Outdated(Exception):
    """The stored files are not those that a packed file was made from."""


def _encoded(
    version: str, image: PackedImage, stamp: Stamp
) -> tuple[bytes, list[bytes | memoryview]]:
    """The beginning of a file, up to the numbers, and the numbers."""
    head = {name: tensor.contiguous() for name, tensor in image.weights.head.items()}
    parts: list[bytes | memoryview] = [_memory_of(image.buffer), *map(_memory_of, head.values())]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    raw = (
        _Header(
            version=version,
            dtype=str(image.buffer.dtype),
            stamp=stamp,
            elements=image.buffer.numel(),
            places={path: _spots(places) for path, places in image.places.items()},
            head={name: (str(one.dtype), tuple(one.shape)) for name, one in head.items()},
            nonzero=image.weights.nonzero,
            zero_sides=image.weights.zero_sides,
            crc=crc,
        )
        .model_dump_json()
        .encode()
    )
    return _START.pack(_MAGIC, len(raw), zlib.crc32(raw)) + raw, parts


def _spots(places: Places) -> tuple[_Spot, _Spot, _Spot | None]:
    a, b, bias = (None if one is None else (one.offset, one.shape, one.by_column) for one in places)
    assert a is not None
    assert b is not None
    return a, b, bias


def _memory_of(tensor: torch.Tensor) -> memoryview:
    whole: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(whole)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Raises ValueError for a dtype that no adapter has."""
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype} is no dtype of an adapter")
    count = _DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    return count


def _exactly(file: BinaryIO, count: int) -> bytearray:
    read = bytearray(count)
    _read_into(file, memoryview(read))
    return read


def _read_into(file: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # type: ignore[attr-defined]  # FileIO has it
        if not count:
            raise ValueError("it ends too early")
        done += count
