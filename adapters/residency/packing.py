"""One adapter's factors in one buffer, in the compute dtype: one allocation, one copy, exact bytes.

The tensors that the checkpoint reader made are let go; what remains is a flat buffer and views of
it. Who keeps it, and in which memory, is decided by ``adapters.residency.slots``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapters.errors import MissingTensors
from adapters.factors import Factors
from adapters.modulation.slot_factors import SlotFactors

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights

# The share of numbers other than zero up to which an adapter is kept without its zeros. In bf16 a
# bit for each number and the numbers left make 0.0625 + share of the whole: 0.5625 at one half.
_SPARSE_TO = 0.75
_TENSOR_ALIGNMENT_BYTES = 64  # a cache line, and enough for every vector unit
_BYTE_BITS = 8  # of a byte
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a buffer."""

    offset: int  # in elements
    shape: tuple[int, ...]
    by_column: bool = False  # a matrix whose columns, not rows, lie in one piece

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Raises RuntimeError where it does not lie in the buffer."""
        strides, step = [], 1
        for size in self.shape if self.by_column else reversed(self.shape):
            strides.append(step)
            step *= max(1, size)
        order = strides if self.by_column else strides[::-1]
        return buffer.as_strided(self.shape, order, self.offset)


Places = tuple[Place, Place, Place | None]  # of A, B and bias of a layer


@dataclass(frozen=True, slots=True)
class PackedImage:
    """What a packed adapter is made of, for a file; no part of it changes any more."""

    weights: AdapterWeights
    buffer: torch.Tensor
    places: Mapping[str, Places]


@dataclass(frozen=True, slots=True)
class _Sparse:
    """A buffer without its zeros: a bit for each number, and those that are none."""

    count: int
    bits: torch.Tensor  # uint8, eight numbers each
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes

    @classmethod
    def of(cls, buffer: torch.Tensor) -> _Sparse:
        # By their bits: -0.0 is no zero, so the buffer comes back exactly.
        mask = buffer.view(_INTEGER[buffer.itemsize]) != 0
        bits = torch.from_numpy(np.packbits(mask.numpy()))
        return cls(buffer.numel(), bits, buffer[mask])

    def whole(self, *, pinned: bool) -> torch.Tensor:
        mask = torch.from_numpy(np.unpackbits(self.bits.numpy(), count=self.count)).bool()
        buffer = torch.zeros(self.count, dtype=self.values.dtype, pin_memory=pinned)
        return buffer.masked_scatter_(mask, self.values)


class PackedAdapter:
    """An adapter in memory. While no slot holds it, a pruned one is kept without its zeros.

    Args:
        weights: The adapter; its factors are views of ``buffer``.
        buffer: All factors, one after the other, in the compute dtype, in host memory.
        places: Where A, B and bias of each layer are in it.
        factors: By layer; views of ``buffer``.
    """

    def __init__(
        self,
        weights: AdapterWeights,
        buffer: torch.Tensor,
        places: Mapping[str, Places],
        factors: Mapping[str, SlotFactors],
    ) -> None:
        self.weights = weights
        self.factors = factors
        self.nbytes = buffer.nbytes
        self._places = places
        self._host: torch.Tensor | None = buffer
        self._device: torch.Tensor | None = None
        self._pinned = buffer.is_pinned()
        self._sparse: _Sparse | None = None  # in place of the host's copy
        dense = 1.0 - weights.sparsity
        self._is_pruned = dense <= _SPARSE_TO
        self._compact_nbytes = int(buffer.nbytes * dense) + buffer.numel() // _BYTE_BITS
        self._head_bytes: int = sum(tensor.nbytes for tensor in weights.head.values())

    def image(self) -> PackedImage:
        """What is to be kept of it in a file, while it is whole in host memory."""
        assert self._host is not None
        return PackedImage(self.weights, self._host, self._places)

    @property
    def is_compact(self) -> bool:
        """Whether its factors are there only without their zeros; ``restore`` makes them whole."""
        return self._sparse is not None

    @property
    def is_loose(self) -> bool:
        """Whether ``compact`` would free memory: pruned, whole, and on no device."""
        return self._is_pruned and self._host is not None and self._device is None

    def compact(self) -> None:
        """Keep the host's copy without its zeros; takes milliseconds a megabyte."""
        assert self._host is not None
        sparse = _Sparse.of(self._host)
        self._rebind(torch.empty_like(self._host, device="meta"))
        self._sparse, self._host = sparse, None

    def stay_whole(self) -> None:
        """Never ``compact`` it again, and count it as it is: that has failed."""
        if self._host is not None:
            self._rebind(self._host)
        self._is_pruned = False

    def restore(self) -> None:
        """Make the host's copy whole again, bit by bit as it was."""
        assert self._sparse is not None
        self._host = self._sparse.whole(pinned=self._pinned)
        self._rebind(self._host)
        self._sparse = None

    def to_device(self, device: torch.device) -> Mapping[str, SlotFactors]:
        """The factors on ``device``, in one piece; on the CPU they are the host's own.

        The copy is only begun: wait for the current stream before the factors are used.
        """
        assert self._host is not None
        if device.type == "cpu":
            self._device = self._host
            return self.factors
        moved = self._device = self._host.to(device, non_blocking=True)
        return {
            path: _with_views(self.factors[path], places, moved)
            for path, places in self._places.items()
        }

    def leave_device(self) -> None:
        """Let the device's copy go; what was released on the host comes back from it first."""
        if self._host is None and self._device is not None:
            self._host = self._device.to("cpu")
            self._rebind(self._host)
        self._device = None

    def host_nbytes(self, *, in_slot: bool) -> int:
        """Bytes of host memory beyond those that the device's budget counts.

        A pruned adapter out of its slot counts as compact, which it is a moment later at most.
        """
        if not in_slot and self._is_pruned:
            return self._head_bytes + self._compact_nbytes
        shared = in_slot and self._host is self._device
        return self._head_bytes + (0 if shared or self._host is None else self.nbytes)

    def release_host_factors(self) -> int:
        """Let the host's copy go while the device has one; returns the bytes freed."""
        if self._host is None or self._device is None or self._host is self._device:
            return 0
        self._host = None
        self._rebind(self._device)
        return self.nbytes

    def _rebind(self, buffer: torch.Tensor) -> None:
        self.factors = {
            path: _with_views(self.factors[path], places, buffer)
            for path, places in self._places.items()
        }
        self.weights = _with_factors(self.weights, self.factors)


def pack_adapter(
    weights: AdapterWeights,
    dtype: torch.dtype,
    device: torch.device,
    *,
    b_by_column: bool = False,
) -> PackedAdapter:
    """Convert an adapter's factors to ``dtype`` in one buffer of host memory.

    Args:
        weights: As read from its checkpoint; its factor tensors are not kept.
        dtype: The compute dtype.
        device: Where they will go: for a CUDA device the buffer is page-locked.
        b_by_column: Lay B down as a contiguous ``[r, out]``, as the fused kernel reads it.

    Raises:
        MissingTensors: The adapter has no factors.
    """
    if not weights.factors:
        raise MissingTensors(
            "The adapter has no factors.", found="0 layers", expected="at least one target layer"
        )
    step = max(1, _TENSOR_ALIGNMENT_BYTES // dtype.itemsize)
    places: dict[str, Places] = {}
    end = 0

    def place(tensor: torch.Tensor, by_column: bool = False) -> Place:
        nonlocal end
        spot = Place(end, tuple(tensor.shape), by_column and tensor.dim() == 2)
        end += -(-tensor.numel() // step) * step
        return spot

    for path, entry in weights.factors.items():
        places[path] = (
            place(entry.a),
            place(entry.b, b_by_column),
            None if entry.bias is None else place(entry.bias),
        )
    buffer = torch.zeros(end, dtype=dtype, pin_memory=device.type == "cuda")
    views = views_in(buffer, places)
    factors: dict[str, Factors] = {}
    for path, (a, b, bias) in views.items():
        source = weights.factors[path]
        for view, tensor in ((a, source.a), (b, source.b), (bias, source.bias)):
            if view is not None and tensor is not None:
                view.copy_(tensor)
        factors[path] = replace(source, a=a, b=b, bias=bias)
    return packed_in(replace(weights, factors=factors), buffer, places)


def views_in(
    buffer: torch.Tensor, places: Mapping[str, Places]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """A, B and bias of each layer, as views of the buffer that they lie in."""
    return {
        path: (a.view(buffer), b.view(buffer), None if bias is None else bias.view(buffer))
        for path, (a, b, bias) in places.items()
    }


def packed_in(
    weights: AdapterWeights, buffer: torch.Tensor, places: Mapping[str, Places]
) -> PackedAdapter:
    """An adapter whose factors are views of ``buffer`` (``views_in``) already."""
    factors = {
        path: SlotFactors(one.method, one.a, one.b, float(one.scale), one.bias)
        for path, one in weights.factors.items()
    }
    return PackedAdapter(weights, buffer, places, factors)


def _with_views(entry: SlotFactors, places: Places, buffer: torch.Tensor) -> SlotFactors:
    a, b, bias = places
    return replace(
        entry,
        a=a.view(buffer),
        b=b.view(buffer),
        bias=None if bias is None else bias.view(buffer),
    )


def _with_factors(weights: AdapterWeights, factors: Mapping[str, SlotFactors]) -> AdapterWeights:
    return replace(
        weights,
        factors={
            path: replace(weights.factors[path], a=entry.a, b=entry.b, bias=entry.bias)
            for path, entry in factors.items()
        },
    )
