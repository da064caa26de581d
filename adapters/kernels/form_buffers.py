"""The buffers that forms of the GPU kernels take beside their answers: pure planning.

Each is asked of a ``Take``, so what a form would need can be counted without taking it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from adapters.kernels.triton_tiles import EXPANDED_COLUMNS

PRODUCT_ROWS: Final = 256  # of one library product

# A buffer by its name, shape and dtype; what it held is gone.
Take = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]


def product_buffers(
    shape: tuple[int, int], rows: int, rank: int, dtype: torch.dtype, take: Take
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W0 ``[out, in]``, the expanded rows ``[blocks · PRODUCT_ROWS, in]``, and their products in
    float32 ``[blocks · PRODUCT_ROWS, out]``: of the form ``product``."""
    expanded = -(-rows * (rank + 1) // PRODUCT_ROWS) * PRODUCT_ROWS
    return (
        take("scratch_w0", shape, dtype),
        take("scratch_z", (expanded, shape[1]), dtype),
        take("scratch_e", (expanded, shape[0]), torch.float32),
    )


def expanded_buffer(
    shape: tuple[int, int], rows: int, rank: int, dtype: torch.dtype, take: Take
) -> torch.Tensor:
    """The expanded rows ``[whole tiles of them, in]``: of the form ``expanded``."""
    tiles = -(-rows * rank // EXPANDED_COLUMNS)
    return take("expanded_z", (tiles * EXPANDED_COLUMNS, shape[1]), dtype)
