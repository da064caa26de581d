"""How much may be admitted at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be admitted at once, over all HTTP processes."""

    requests: int
    tokens: int
    adapter_requests: int
    adapter_tokens: int | None = None  # None: no bound but that of all
    pixel_bytes: int | None = None  # None: no bound but that of tokens

    def token_share(self, processes: int) -> int | None:
        """`share`, of tokens."""
        if self.adapter_tokens is None:
            return None
        return max(1, math.ceil(self.adapter_tokens / processes))

    def share(self, processes: int) -> int:
        """One process's part of the bound per adapter, which is not counted across them."""
        return max(1, math.ceil(self.adapter_requests / processes))
