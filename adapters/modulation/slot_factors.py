"""One adapter in one layer, as it lies in a slot of the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from adapters.kernels import native_ops
from adapters.signature import Method


@dataclass(frozen=True, slots=True)
class SlotFactors:
    """What one adapter brings to one layer, on the device, in the compute dtype.

    Args:
        method: ``hira`` or ``lora``.
        a: ``[r, in]``; of a convolution ``[r, in, *kernel]``; of an embedding ``[r, embeddings]``.
        b: ``[out, r]``; of a convolution ``[out, r, 1, ...]``.
        scale: LoRA's s; 1 for HiRA.
        bias: ``[out]``, which replaces the layer's own, or None.
    """

    method: Method
    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None
    # What the compiled kernel reads of it; b"" where it cannot, None until first asked for.
    _record: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def native_record(self) -> bytes:
        """The kernel's record of these factors, or b"" where it cannot read them."""
        if self._record is None:
            is_hira = self.method == "hira"
            found = native_ops.record(
                self.a if is_hira else None, self.b if is_hira else None, self.bias
            )
            object.__setattr__(self, "_record", found or b"")
        assert self._record is not None
        return self._record

    def to(self, dtype: torch.dtype) -> SlotFactors:
        """The same factors in ``dtype``; itself when they are."""
        if self.a.dtype == dtype:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype), bias=bias)
