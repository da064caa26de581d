"""Whether torch's own attention over sequences of many lengths (FlashAttention) can run here."""

from __future__ import annotations

from typing import Final

import torch

VARLEN_MAX_WIDTH: Final = 256  # of a head


def varlen_obstacle(
    width: int, dtype: torch.dtype, device: torch.device, *, capped: bool
) -> str | None:
    """Why torch's own kernel cannot attend here; None: it can.

    Args:
        width: Of a head.
        dtype, device: Of keys and values.
        capped: Whether the model bounds its scores by a soft cap.
    """
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a device before capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}"
    if width > VARLEN_MAX_WIDTH or width % 8:
        return f"heads {width} wide"
    return "a soft cap of the scores" if capped else None
