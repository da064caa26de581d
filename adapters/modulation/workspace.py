"""Buffers that all layers of a model share, so that none is allocated anew for every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from adapters.modulation.quant import QuantizedWeight

_CPU = torch.device("cpu")


class Workspace:
    """Buffers that every layer of a model reuses, each as large as its largest use so far."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous buffer of ``shape``; what it held under ``name`` is gone."""
        count = 1
        for size in shape:
            count *= size
        return self.whole(name, count, dtype, device)[:count].view(shape)

    def whole(
        self, name: str, count: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """All of the flat buffer behind ``name``, of at least ``count`` elements."""
        key = (name, dtype, device)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < count:
            with torch.inference_mode(False):  # else it could not be written outside that mode
                flat = self._flat[key] = torch.empty(count, dtype=dtype, device=device)
        return flat

    def dequantized(self, weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
        """W0 ``[out, in]`` in ``dtype``, in a buffer that the next layer overwrites, or the stored
        weight itself. Never write to it."""
        if weight.is_ready(dtype):
            return weight.dequantize(dtype=dtype)
        return weight.dequantize(self.take("w0", weight.shape, dtype, weight.device))

    def bytes_on_cpu(self, count: int) -> torch.Tensor:
        """At least ``count`` bytes for the compiled kernel; what they held is gone."""
        return self.whole("native", count, torch.uint8, _CPU)
