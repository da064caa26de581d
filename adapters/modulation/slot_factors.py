"""One adapter in one layer, as it lies in a slot of the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from adapters.factors import Factors
from adapters.kernels import native_ops


@dataclass(frozen=True, slots=True)
class SlotFactors(Factors):
    """Factors that lie in a slot: on the device, in the compute dtype."""

    # What the compiled kernel reads of it; b"" where it cannot, None until first asked for.
    _record: bytes | None = field(default=None, init=False, repr=False, compare=False)

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
