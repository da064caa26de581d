"""Whether a form of the kernels gives what another gives: row by row, of rows that are finite.

A probe at the start sees made-up layers. What a form makes of the very call at hand is compared
with the fused kernel's answer here, before the form may compute such calls.
"""

from __future__ import annotations

import math
from typing import Final

import torch

# Of a row, relative to its largest number: of the fused kernel's answer, or of float64's in the
# probe at the start. Answers are rounded by 2⁻⁸ in bfloat16, and so are, on
# the way, modulated weights or expanded rows, whose errors are of either sign: forms that are right
# are apart by a tenth of this.
FORM_TOLERANCE: Final = 2e-2
_ROWS_AT_ONCE: Final = 256  # in float32: bounds the memory that comparing takes


def row_difference(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """The largest difference in a row, relative to the largest number of that row.

    Args:
        found: ``[rows, out]``.
        wanted: Likewise. Rows in which it is not finite, as of an adapter that overflows, say
            nothing; a row that is not finite in ``found`` alone is infinitely far off.

    Returns:
        None: no row of ``wanted`` is finite. Synchronizes once.
    """
    least = torch.finfo(wanted.dtype).tiny
    worst = torch.zeros((), dtype=torch.float32, device=wanted.device)
    told = torch.zeros((), dtype=torch.bool, device=wanted.device)
    for start in range(0, len(wanted), _ROWS_AT_ONCE):
        right = wanted[start : start + _ROWS_AT_ONCE].float()
        off = (found[start : start + _ROWS_AT_ONCE].float() - right).abs().amax(dim=1)
        off = off / right.abs().amax(dim=1).clamp(min=least)
        finite = right.isfinite().all(dim=1)
        off = torch.where(finite, off.nan_to_num(math.inf), 0.0)
        worst, told = torch.maximum(worst, off.amax()), told | finite.any()
    answer = torch.where(told, worst, math.nan).item()
    return None if math.isnan(answer) else float(answer)
