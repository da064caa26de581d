"""Which base this is: a digest of a checkpoint's weights, by which adapters know theirs again.

Reads headers and samples, never all of a large checkpoint, and no tensor library: it costs
milliseconds, wherever the weights will be served.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO, Final

from server.base.plan import BaseModelError

SAMPLE_BYTES: Final = 4096
SAMPLES: Final = 4  # pieces of a tensor, from its first byte to its last
_HEADER_MAX_BYTES: Final = 100_000_000  # the format's own limit


def checkpoint_digest(folder: Path) -> str:
    """Digest of the weights in ``folder``: SHA-256 over every tensor by name, with its dtype, its
    shape and its bytes; of a tensor above SAMPLES x SAMPLE_BYTES bytes only that many, in pieces
    spread evenly from the first byte to the last. Training moves nearly every number of a tensor,
    so another fine-tune of the same shapes is another base; that a tensor was changed by hand
    between two samples is not seen.

    Not in it: names and places of files, how the tensors are divided among them, metadata, the
    tokenizer, config.json, and how the base is served. The same checkpoint has the same digest on
    every device, in every ``--dtype`` and ``--quantization``, because adapters belong to the
    checkpoint. One that is stored in 4 or 8 bits is another base than the one it was made from:
    its weights are other numbers.

    Args:
        folder: Has ``*.safetensors``; those that the index names when there is one.

    Returns:
        The first 32 hex digits.

    Raises:
        BaseModelError: A file is missing or malformed.
    """
    index = folder / "model.safetensors.index.json"
    digest = hashlib.sha256()
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        tensors: list[tuple[str, Path, int, dict[str, Any]]] = []
        for name in files:
            with (folder / name).open("rb") as file:
                start, header = _header(file)
            tensors += [
                (tensor, folder / name, start, entry)
                for tensor, entry in header.items()
                if tensor != "__metadata__"
            ]
        for tensor, path, start, entry in sorted(tensors, key=lambda one: one[0]):
            first, last = (start + int(offset) for offset in entry["data_offsets"])
            digest.update(json.dumps([tensor, entry["dtype"], list(entry["shape"])]).encode())
            with path.open("rb") as file:
                for position, size in _samples(first, last):
                    file.seek(position)
                    piece = file.read(size)
                    if len(piece) < size:
                        raise ValueError(f"{path.name} ends inside {tensor}")
                    digest.update(piece)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BaseModelError(
            "The base model's weights cannot be read.",
            found=f"{type(error).__name__}: {error}",
            expected="sound safetensors files",
            fix="Download the base again.",
        ) from error
    return digest.hexdigest()[:32]


def _header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin in a safetensors file, and its header."""
    size = int.from_bytes(file.read(8), "little")
    if size > _HEADER_MAX_BYTES:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return 8 + size, header


def _samples(first: int, last: int) -> list[tuple[int, int]]:
    """Positions and sizes of what is read of the bytes from ``first`` to before ``last``."""
    size = last - first
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(first, size)]
    room = size - SAMPLE_BYTES
    return [(first + room * piece // (SAMPLES - 1), SAMPLE_BYTES) for piece in range(SAMPLES)]
