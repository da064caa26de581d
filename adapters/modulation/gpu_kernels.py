"""The modules of the GPU kernels, which import triton: loaded when one of them is first wanted."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import adapters.kernels


def tile_kernels() -> Any:
    """The fused kernel for many rows of a slot and few, and LoRA by address."""
    from adapters.kernels import triton_ops

    return triton_ops


def row_kernels() -> Any:
    """The kernel for one row."""
    from adapters.kernels import triton_one_row

    return triton_one_row


def scratch_kernels() -> Any:
    """The kernels that write weights to scratch memory."""
    from adapters.kernels import triton_scratch

    return triton_scratch


def expanded_kernels() -> Any:
    """The kernel for rows that factors expanded."""
    from adapters.kernels import triton_expanded

    return triton_expanded


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """What the kernels are compiled from and by: times hold for that alone."""
    try:
        compiler = version("triton")
    except PackageNotFoundError:  # torch operators compute
        compiler = "none"
    found = hashlib.sha256(compiler.encode())
    for path in sorted(Path(adapters.kernels.__path__[0]).glob("triton_*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
