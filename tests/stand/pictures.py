"""Pictures for a tiny vision base, and what float64 says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from adapters.tasks import Task
from tests.stand import tiny_bases
from tests.stand.tiny_bases import Reference, image, image_file

TASK: Task = "image-classification"

LABELS = {"pets": ("cat", "dog", "eel"), "flags": ("red", "blue"), "age": ("years",)}

SIZES = ((16, 16), (40, 30), (9, 50), (16, 64))


def pictures() -> list[Any]:
    return [image(*size, seed=seed) for seed, size in enumerate(SIZES)]


def prepared(picture: Any) -> torch.Tensor:
    """By Pillow and numpy alone: scaled to the base's size, then to -1 … 1."""
    from PIL import Image

    side = tiny_bases.IMAGE_SIDE
    scaled = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    values = np.asarray(scaled, dtype=np.float64) / 255
    return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)


def logits_of(reference: Reference, picture: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = reference.model(pixel_values=prepared(picture)[None]).logits[0]
    return found


def expected(name: str, logits: torch.Tensor) -> list[dict[str, Any]]:
    values = {"pets": logits.softmax(-1), "flags": logits.sigmoid(), "age": logits}[name].tolist()
    pairs = sorted(zip(values, LABELS[name], strict=True), reverse=True)
    return [{"label": label, "score": value} for value, label in pairs]


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header claims 60,000 x 60,000 pixels."""
    import struct
    import zlib

    raw = bytearray(image_file(image(8, 8)))
    raw[16:24] = struct.pack(">II", 60_000, 60_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    return bytes(raw)
