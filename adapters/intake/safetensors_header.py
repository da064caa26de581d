"""The header of a safetensors file, checked before a byte of any tensor is read.

The format is eight bytes of little-endian length, that many bytes of JSON, then the tensors' bytes
without gap or overlap. Everything that a hostile header could claim is bounded here; what the
tensors mean is left to ``checkpoint``.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    CorruptFile,
    NonFinite,
    UnsafeFormat,
    UploadTooLarge,
)
from adapters.intake.recent_results import RecentResults
from adapters.intake.strict_json import show, strict_json

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 8_192
MAX_TENSOR_FILE_BYTES = 16 << 30
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
CHUNK_ELEMENTS = 1 << 20
_LENGTH_BYTES = 8
# Headers that were read last: adapters of one recipe have the same. Larger ones are parsed anew.
TENSOR_FILE: Final = "adapter_model.safetensors"
_RECENT_HEADERS = 32
_RECENT_HEADER_BYTES = 1 << 18

SAFETENSORS_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SUM_DTYPE = torch.float32
_FLOAT32_MAX = torch.finfo(torch.float32).max
# How pickles begin: torch.save's zip, and a bare pickle of protocol 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: bytes ``start`` (included) to ``stop`` of the whole file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


_recent_headers: Final[RecentResults[tuple[TensorEntry, ...]]] = RecentResults(_RECENT_HEADERS)


@dataclass(frozen=True, slots=True)
class Finite:
    """What one pass over a tensor's values found."""

    nonzero: int
    fault: NonFinite | None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, and nothing else (no device, pipe or directory).

    Raises:
        CorruptFile: It is missing, not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as cause:
        raise CorruptFile(
            f"{path.name} cannot be read.", found=cause.strerror, expected="a regular file"
        ) from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptFile(f"{path.name} is not a regular file.", expected="a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def pickle_refused(found: str) -> UnsafeFormat:
    """The refusal of an adapter whose tensors are a pickle; ``found`` names the file."""
    return UnsafeFormat(
        "The adapter is a pickle, which can run code when it is read.",
        found=found,
        expected="adapter_model.safetensors, in the safetensors format",
        fix="Save it with save_pretrained(safe_serialization=True); "
        "what the HiRA authors' own code saved: hira convert SOURCE DEST.",
    )


def open_tensors(folder: Path) -> AbstractContextManager[BinaryIO]:
    """Open the tensors of an adapter folder, as ``open_regular`` does.

    Raises:
        UnsafeFormat: A pickle is there in their place; it is never opened.
        CorruptFile: They are missing, or no regular file.
    """
    path = folder / TENSOR_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise pickle_refused("adapter_model.bin")
    return open_regular(path)


def read_header(file: BinaryIO) -> dict[str, TensorEntry]:
    """Read and check the header of an open safetensors file.

    Args:
        file: Open for reading at any position; left somewhere else.

    Returns:
        The entries in the order of their bytes: together they cover the rest of the file exactly.

    Raises:
        UnsafeFormat: A pickle under the name of a safetensors file.
        UploadTooLarge: More bytes or tensors than are ever read.
        CorruptFile: Anything else that a well-formed file does not have.
        AdapterFaults: Several of these.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_TENSOR_FILE_BYTES:
        raise UploadTooLarge(
            "The tensors are too large.",
            found=f"{size} bytes",
            expected=f"at most {MAX_TENSOR_FILE_BYTES}",
        )
    file.seek(0)
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    # A header of 640 bytes begins as a pickle does; one that could not fit is the pickle.
    if length > min(size, MAX_HEADER_BYTES) and start.startswith(_PICKLE_STARTS):
        raise pickle_refused("adapter_model.safetensors that begins like a pickle")
    if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise _corrupt_header(
            "The file ends inside its header.",
            found=f"{size} bytes" + (f", header of {length}" if len(start) == 8 else ""),
            expected="eight bytes of length, the header, the tensors",
        )
    if length > MAX_HEADER_BYTES:
        raise _corrupt_header(
            "The header is too long.",
            found=f"{length} bytes",
            expected=f"at most {MAX_HEADER_BYTES}",
        )
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise _corrupt_header(
            "The header does not begin as JSON.", found=show(raw[:16]), expected="a JSON object"
        )
    if length > _RECENT_HEADER_BYTES:
        return _parse_header(raw, size)
    entries = _recent_headers.get((raw, size), lambda: tuple(_parse_header(raw, size).values()))
    return {entry.name: entry for entry in entries}


def read_tensor(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into memory of its own (never mapped, so the file may change or vanish).

    Args:
        file: Open for reading; its position moves.
        entry: An entry of this file's header.

    Returns:
        A CPU tensor of the entry's dtype and shape.

    Raises:
        CorruptFile: The file is shorter than it was when its header was checked.
    """
    buffer = bytearray(entry.stop - entry.start)
    view = memoryview(buffer)
    file.seek(entry.start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]  # BufferedReader has it
        if not count:
            raise _corrupt_header(
                f"The file ends inside {entry.name}.",
                found=f"{done} bytes",
                expected=f"{len(view)} bytes",
            )
        done += count
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def inspect_values(tensor: torch.Tensor, name: str) -> Finite:
    """Count the nonzero values and look for NaN, infinity and values beyond float32.

    Reads the tensor in chunks of ``CHUNK_ELEMENTS``, so the extra memory is bounded.

    Args:
        tensor: Any shape, floating point, on the CPU.
        name: Its name, for the fault.
    """
    nonzero = 0
    bad = 0
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        chunk = flat[start : start + CHUNK_ELEMENTS]
        nonzero += int(torch.count_nonzero(chunk))
        # NaN and infinity reach the sum; a sum that overflows by itself is looked into.
        if chunk.dtype is not torch.float64 and math.isfinite(float(chunk.sum(dtype=_SUM_DTYPE))):
            continue
        finite = torch.isfinite(chunk)
        if chunk.dtype is torch.float64:
            finite &= chunk.abs() <= _FLOAT32_MAX
        bad += chunk.numel() - int(finite.sum())
    if not bad:
        return Finite(nonzero, None)
    return Finite(
        nonzero,
        NonFinite(
            f"{name} has values that are not finite in float32.",
            found=f"{bad} of {tensor.numel()} values",
            expected="0",
            fix="Train again at a lower learning rate, or in bfloat16 or float32.",
        ),
    )


def _corrupt_header(message: str, *, found: str, expected: str) -> CorruptFile:
    return CorruptFile(
        message,
        found=found,
        expected=expected,
        fix="Copy the file again, or save the adapter again.",
    )


def _parse_header(raw: bytes, size: int) -> dict[str, TensorEntry]:
    """The entries of a header, in a file of ``size`` bytes."""
    content = strict_json(raw, "The header of adapter_model.safetensors", MAX_HEADER_BYTES)
    _check_metadata(content.pop("__metadata__", {}))
    if len(content) > MAX_TENSORS:
        raise UploadTooLarge(
            "The file has too many tensors.",
            found=str(len(content)),
            expected=f"at most {MAX_TENSORS}",
        )
    return _entries(content, _LENGTH_BYTES + len(raw), size)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _corrupt_header(
            "The header's __metadata__ is malformed.",
            found=show(metadata),
            expected="an object of strings",
        )


def _entries(content: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorEntry]:
    faults: list[AdapterError] = []
    entries: list[TensorEntry] = []
    for name, claim in content.items():
        try:
            entries.append(_entry(name, claim, data_start, size))
        except CorruptFile as fault:
            faults.append(fault)
            if len(faults) == 8:  # enough to see the pattern; the rest would say the same
                break
    if not faults:
        faults += _coverage_faults(
            sorted(entries, key=lambda e: (e.start, e.stop)), data_start, size
        )
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise AdapterFaults(faults)
    return {entry.name: entry for entry in sorted(entries, key=lambda e: (e.start, e.stop))}


def _entry(name: str, claim: object, data_start: int, size: int) -> TensorEntry:
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise _corrupt_header(
            "A tensor's name is malformed.",
            found=show(name),
            expected=f"1 to {MAX_NAME_CHARACTERS} printable characters",
        )
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt_header(
            f"The header's entry for {name} is malformed.",
            found=show(claim),
            expected="dtype, shape and data_offsets",
        )
    dtype = SAFETENSORS_DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        raise _corrupt_header(
            f"{name} has a dtype that adapters do not have.",
            found=show(claim["dtype"]),
            expected="one of " + ", ".join(SAFETENSORS_DTYPES),
        )
    shape, offsets = claim["shape"], claim["data_offsets"]
    if not (_naturals(shape) and len(shape) <= MAX_DIMENSIONS):
        raise _corrupt_header(
            f"The shape of {name} is malformed.",
            found=show(shape),
            expected=f"at most {MAX_DIMENSIONS} whole numbers",
        )
    if not (_naturals(offsets) and len(offsets) == 2):
        raise _corrupt_header(
            f"The offsets of {name} are malformed.",
            found=show(offsets),
            expected="two whole numbers",
        )
    start, stop = data_start + offsets[0], data_start + offsets[1]
    expected_bytes = math.prod(shape) * dtype.itemsize
    if not start <= stop <= size or stop - start != expected_bytes:
        raise _corrupt_header(
            f"The bytes of {name} are not those of its shape, or lie outside the file.",
            found=f"bytes {start} to {stop} of {size}",
            expected=f"{expected_bytes} bytes inside the file",
        )
    return TensorEntry(name, dtype, tuple(shape), start, stop)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 48 for item in value
    )


def _coverage_faults(entries: list[TensorEntry], data_start: int, size: int) -> list[AdapterError]:
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "follows a gap"
            return [
                _corrupt_header(
                    f"{entry.name} {kind}.",
                    found=f"offset {entry.start - data_start}",
                    expected=f"offset {position - data_start}",
                )
            ]
        position = entry.stop
    if position != size:
        return [
            _corrupt_header(
                "The file is longer than its tensors.",
                found=f"{size} bytes",
                expected=f"{position} bytes",
            )
        ]
    return []
