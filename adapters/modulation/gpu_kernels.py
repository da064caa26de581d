"""The modules of the GPU kernels, which import triton: loaded when one of them is first wanted."""

from __future__ import annotations

from typing import Any


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
