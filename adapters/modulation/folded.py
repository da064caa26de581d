"""Folded weights kept between calls, within a budget of bytes.

A folded weight W0 ⊙ (1 + B A) belongs to one slot and one layer and is dropped with its slot. It is
full size in the compute dtype, so few are worth their bytes: those stay that save the most time a
byte, by what they save a use and how often their slot was used of late. Which rows use one is
decided by ``adapters.modulation.modulator``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from math import prod
from threading import Lock

import torch

_HALF_LIFE_FORWARDS = 256
# How many times the value of what would go a newcomer must have: close rivals would take turns.
_RIVALRY = 1.5
# Weights folded anew in one forward at most, so that no single request waits for all of them.
_FILLS_A_FORWARD = 8

_VERSIONS = count()


@dataclass(slots=True)
class _Kept:
    weight: torch.Tensor
    saving_ns: float  # a use


@dataclass(slots=True)
class _Uses:
    count: float  # decayed
    at: int  # the forward of the latest


class FoldedCache:
    """Folded weights by slot and layer, the least valuable out first; never above the budget.

    Args:
        budget_bytes: Of all weights kept; 0 keeps none.
        device: Where they are.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self.device = device
        # Another one whenever what is kept, or may be worth keeping, has changed; no two caches
        # ever have the same.
        self.version = next(_VERSIONS)
        self._kept: OrderedDict[tuple[int, str], _Kept] = OrderedDict()
        self._uses: dict[int, _Uses] = {}
        self._nbytes = 0
        self._forwards = 0
        self._fills = 0  # of this forward
        self._floor: tuple[int, float] | None = None  # when it was looked up, the least value
        self._lock = Lock()  # slots are emptied by the loader's thread

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def count_forward(self, slots: Iterable[int]) -> None:
        """A forward begins that uses ``slots``."""
        if self.budget_bytes == 0:
            return
        with self._lock:
            self._forwards += 1
            if self._fills >= _FILLS_A_FORWARD:
                self.version = next(_VERSIONS)  # some were put off
            self._fills = 0
            for slot in slots:
                before = self._uses_of(slot)
                self._uses[slot] = _Uses(before + 1.0, self._forwards)
                if int(before).bit_length() != int(before + 1.0).bit_length():
                    self.version = next(_VERSIONS)

    def has(self, slot: int, layer: str, dtype: torch.dtype | None = None) -> bool:
        """Whether ``get`` would find it, in that ``dtype`` if one is named; counts as no use."""
        kept = self._kept.get((slot, layer))
        return kept is not None and (dtype is None or kept.weight.dtype == dtype)

    def get(self, slot: int, layer: str) -> torch.Tensor | None:
        """The folded weight ``[out, in]``, or None."""
        with self._lock:
            kept = self._kept.get((slot, layer))
            if kept is None:
                return None
            self._kept.move_to_end((slot, layer))
            return kept.weight

    def is_worth(self, slot: int, nbytes: int, saving_ns: float, fill_ns: float) -> bool:
        """Whether a weight should be folded and kept now.

        It pays once its slot was used so often of late that to have kept it would have saved what
        it costs to make: whatever comes then, no more than twice the best is spent. Where there is
        no room, it must also be worth clearly more a byte than the least valuable that is kept.
        """
        if nbytes > self.budget_bytes or saving_ns <= 0 or self._fills >= _FILLS_A_FORWARD:
            return False
        with self._lock:
            uses = self._uses_of(slot)
            if uses * saving_ns < fill_ns:
                return False
            if self._nbytes + nbytes <= self.budget_bytes:
                return True
            if self._floor is None or self._floor[0] != self._forwards:
                self._floor = (self._forwards, min(map(self._value, self._kept)))
            return uses * saving_ns / nbytes > _RIVALRY * self._floor[1]

    def reserve(
        self,
        slot: int,
        layer: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        saving_ns: float = 0.0,
    ) -> torch.Tensor | None:
        """Room for one, for the caller to fill before its next call; None if it cannot fit.

        Others go to make room, the least valuable first and of equals the one unused the longest,
        so do not hold one from ``get`` across this call.
        """
        need = prod(shape) * dtype.itemsize
        if need > self.budget_bytes:
            return None
        with self._lock:
            self._drop((slot, layer))
            while self._nbytes + need > self.budget_bytes:
                self._drop(min(self._kept, key=self._value))
            with torch.inference_mode(False):
                weight = torch.empty(shape, dtype=dtype, device=self.device)
            self._kept[slot, layer] = _Kept(weight, saving_ns)
            self._nbytes += need
            self._fills += 1
            self.version = next(_VERSIONS)
            self._floor = None
        return weight

    def discard(self, slot: int, layer: str) -> None:
        """Drop one, if it is there."""
        with self._lock:
            self._drop((slot, layer))
            self.version = next(_VERSIONS)

    def forget(self, slot: int) -> None:
        """Drop everything of ``slot``; what its factors were is no longer true."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == slot]:
                self._drop(key)
            self._uses.pop(slot, None)
            self.version = next(_VERSIONS)
            self._floor = None

    def _drop(self, key: tuple[int, str]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._nbytes -= kept.weight.nbytes

    def _uses_of(self, slot: int) -> float:
        uses = self._uses.get(slot)
        if uses is None:
            return 0.0
        passed = self._forwards - uses.at
        return uses.count if not passed else uses.count * 0.5 ** (passed / _HALF_LIFE_FORWARDS)

    def _value(self, key: tuple[int, str]) -> float:
        """Time saved a byte, by use of late."""
        kept = self._kept[key]
        return self._uses_of(key[0]) * kept.saving_ns / kept.weight.nbytes
