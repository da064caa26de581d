"""What the fused kernel reads of a layer and of its adapters: packed weights, factor addresses.

Everything here is built on the host, without triton, and checked before anything is written: a
kernel that follows a wrong address answers for another tenant. ``adapters.kernels.triton_ops``
launches; who holds the factors, and when a slot may be reused, is the residency's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from adapters.errors import ShapeMismatch, SlotNotResident
from adapters.kernels.nibbles import FourBitKind, level_values
from adapters.segments import BASE_SLOT

HALF_FEATURES = 64
GROUP_FEATURES = 2 * HALF_FEATURES
KERNEL_MAX_RANK = 128
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
FACTOR_COLUMNS = 3
ADDRESS_MULTIPLE_BYTES = 16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A frozen 4-bit weight W0 ``[out, in]`` as the fused kernel reads it.

    Made by :func:`pack_weight`; never mutated. 0.5625 bytes a weight in blocks of 64.
    """

    kind: FourBitKind
    shape: tuple[int, int]  # out, in
    packed: torch.Tensor  # uint8 [out * in / 2]; which weights share a byte: see ``grouped``
    levels: torch.Tensor  # float32 [16], the value of each 4-bit code
    scales: torch.Tensor  # float32 [ceil(out * in / block)]
    block: int  # weights that share a scale, along the flat weight
    # False: bitsandbytes' order, bytes hold columns 2j (high half) and 2j + 1.
    # True: within each 128 columns of a row, byte j holds columns j (high half) and j + 64, so that
    # both halves of a tile read x and A contiguously and need one scale a row.
    grouped: bool

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight on its device, scales and tables included."""
        return self.packed.nbytes + self.levels.nbytes + self.scales.nbytes

    def ungrouped(self) -> torch.Tensor:
        """The bytes in bitsandbytes' order, for its dequantization: uint8 ``[out * in / 2]``."""
        return ungrouped(self.packed) if self.grouped else self.packed


def pack_weight(
    stored: torch.Tensor,
    scales: torch.Tensor,
    kind: FourBitKind,
    shape: tuple[int, int],
    block: int,
    *,
    group: bool = True,
) -> PackedWeight:
    """A packed weight from bitsandbytes' storage, the fields of ``QuantizedWeight``.

    Args:
        stored: uint8, ``out * in / 2`` bytes, two weights a byte, the first in the high half.
        scales: float32, one a block of the flat weight.
        kind: Which sixteen levels.
        shape: ``(out, in)``.
        block: Weights a scale, an even number.
        group: Reorder the bytes into the faster layout where the shape allows it (in a multiple of
            128, block one of 64). That is a copy of ``stored``: drop the original and use
            :meth:`PackedWeight.ungrouped`, or pay for both (1.02 bytes a weight).

    Returns:
        The weight; shares ``scales``, and ``stored`` unless it was reordered.

    Raises:
        ShapeMismatch: Sizes or types that do not belong together, or an odd number of inputs:
            such rows do not start at a byte; use the torch operators for that layer.
    """
    out_features, in_features = shape
    count = out_features * in_features
    if in_features % 2 or block % 2 or block <= 0:
        raise ShapeMismatch(
            "A row of this 4-bit weight does not start at a byte.",
            found=f"{in_features} inputs, blocks of {block}",
            expected="even numbers",
            fix="use the torch operators for this layer",
        )
    blocks = -(-count // block)
    _check_operands(
        "packed weight", stored.reshape(-1), (count // 2,), (torch.uint8,), stored.device
    )
    _check_operands("scales", scales, (blocks,), (torch.float32,), stored.device)
    levels = torch.tensor(level_values(kind), dtype=torch.float32, device=stored.device)
    packed = stored.reshape(-1)
    weight = PackedWeight(kind, shape, packed, levels, scales, block, grouped=False)
    if not group or in_features % GROUP_FEATURES or block % HALF_FEATURES:
        return weight
    high, low = _nibbles(weight.packed)
    columns = torch.stack((high, low), dim=1).view(-1, 2, HALF_FEATURES)
    return replace(weight, packed=_bytes(columns.transpose(1, 2).reshape(-1, 2)), grouped=True)


class FactorTable:
    """Where the factors of every slot and layer lie on one device, as the kernel looks them up.

    The factors stay where they were allocated, whatever their ranks; the table holds two addresses
    and a rank (24 bytes a slot and layer) and keeps the tensors alive. One table serves all layers
    of a model, so filling a slot is one small copy. Not thread-safe; place or clear a slot on the
    stream that the kernels run on, or when no kernel that reads it is under way.

    Args:
        slots: How many, slot 0 (the bare base) included.
        layers: ``(out, in)`` of each layer; its index here names it.
        dtype: Of every factor: that of the activations.
        device: Of every factor.
    """

    def __init__(
        self,
        slots: int,
        layers: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if dtype not in KERNEL_DTYPES:
            raise ShapeMismatch(
                "The fused kernel does not compute in this type.",
                found=str(dtype),
                expected=", ".join(map(str, KERNEL_DTYPES)),
            )
        self.layers = tuple(layers)
        self.dtype = dtype
        # int64 [slots, layers, 3]: addresses of A [r, in] and Bᵀ [r, out], then r (0: as base).
        shape = (slots, len(self.layers), FACTOR_COLUMNS)
        self.addresses = torch.zeros(shape, dtype=torch.int64, device=device)
        self._ranks: list[tuple[int, ...] | None] = [None] * slots
        self._ranks[BASE_SLOT] = (0,) * len(self.layers)
        self._alive: dict[int, list[torch.Tensor]] = {}

    @property
    def slots(self) -> int:
        return len(self._ranks)

    def grow(self, slots: int) -> None:
        """Have room for ``slots`` slots at least; those that are filled stay as they are."""
        more = max(slots, 2 * self.slots) - self.slots
        if slots <= self.slots:
            return
        empty = self.addresses.new_zeros(more, *self.addresses.shape[1:])
        self.addresses = torch.cat((self.addresses, empty))
        self._ranks += [None] * more

    def rank(self, slot: int, layer: int) -> int:
        """The rank of a slot's factors in a layer, 0 where it has none.

        Raises:
            SlotNotResident: Nothing was placed in the slot, or the table has no such slot.
        """
        ranks = self._ranks[slot] if 0 <= slot < self.slots else None
        if ranks is None:
            raise SlotNotResident(
                "A segment names a slot without factors.",
                found=f"slot {slot}",
                expected="one of " + ", ".join(str(i) for i, r in enumerate(self._ranks) if r),
                fix="lease the adapter before the batch is built",
            )
        return ranks[layer]

    def place(self, slot: int, factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put an adapter in a slot; mutates the table, replacing what the slot held.

        Args:
            slot: 1 or more.
            factors: By layer index: A ``[r, in]`` contiguous, and B ``[out, r]`` as the transpose
                of a contiguous ``[r, out]`` (``b_t.t()``), so that both are read along their rows
                whatever the rank; starts at multiples of 16 bytes. Layers left out are the base's.

        Raises:
            SlotNotResident: The table has no such slot, or it is the base's.
            ShapeMismatch: A factor of the wrong shape, rank, type, device or memory layout.
                Nothing was changed.
        """
        if not 0 < slot < self.slots:
            raise SlotNotResident(
                "The table has no such slot.", found=f"{slot}", expected=f"1 to {self.slots - 1}"
            )
        rows = [(0, 0, 0)] * len(self.layers)
        alive: list[torch.Tensor] = []
        for layer, (a, b) in factors.items():
            out_features, in_features = self.layers[layer]
            rank = a.shape[0]
            if not 1 <= rank <= KERNEL_MAX_RANK:
                raise ShapeMismatch(
                    "The fused kernel does not take this rank.",
                    found=f"layer {layer}, rank {rank}",
                    expected=f"1 to {KERNEL_MAX_RANK}",
                    fix="use the torch operators for this adapter",
                )
            where = self.addresses.device
            _check_operands(f"A of layer {layer}", a, (rank, in_features), (self.dtype,), where)
            _check_operands(
                f"Bᵀ of layer {layer}", b.t(), (rank, out_features), (self.dtype,), where
            )
            rows[layer] = (a.data_ptr(), b.data_ptr(), rank)
            if any(address % ADDRESS_MULTIPLE_BYTES for address in rows[layer][:2]):
                raise ShapeMismatch(
                    "A factor is not aligned.",
                    found=f"layer {layer}, addresses {rows[layer][:2]}",
                    expected=f"multiples of {ADDRESS_MULTIPLE_BYTES} bytes",
                )
            alive += (a, b)
        row = torch.tensor(rows, dtype=torch.int64).view(len(rows), FACTOR_COLUMNS)
        self.addresses[slot].copy_(row)
        self._ranks[slot] = tuple(rank for _, _, rank in rows)
        self._alive[slot] = alive

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors; mutates the table. Emptying twice is harmless."""
        if not 0 < slot < self.slots or self._ranks[slot] is None:
            return
        self._ranks[slot] = None
        self.addresses[slot].zero_()  # rank 0: whoever came here by mistake would read nothing
        self._alive.pop(slot, None)


def check_operands(
    x: torch.Tensor,
    weight: PackedWeight,
    factors: FactorTable,
    layer: int,
    *,
    tiles: torch.device,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Raise ShapeMismatch unless a call of the fused kernel has operands that belong together.

    The arguments are those of ``hira_linear``; ``tiles`` is where the batch's tiles are.
    """
    out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features or x.stride(1) != 1 or x.dtype != factors.dtype:
        raise ShapeMismatch(
            "The rows do not fit the layer.",
            found=f"{tuple(x.shape)} {x.dtype}, strides {x.stride()}",
            expected=f"(rows, {in_features}) {factors.dtype}, features contiguous",
        )
    if not 0 <= layer < len(factors.layers) or factors.layers[layer] != weight.shape:
        raise ShapeMismatch(
            "The factor table has no such layer of this shape.",
            found=f"layer {layer} of {len(factors.layers)}, weight {weight.shape}",
            expected="the shape that the table was made with",
        )
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_contiguous()):
        raise ShapeMismatch(
            "The bias does not fit the layer.",
            found=str(tuple(bias.shape)),
            expected=f"contiguous ({out_features},)",
        )
    if out is not None and (tuple(out.shape) != (len(x), out_features) or not out.is_contiguous()):
        raise ShapeMismatch(
            "The output does not fit the layer.",
            found=f"{tuple(out.shape)}, strides {out.stride()}",
            expected=f"contiguous ({len(x)}, {out_features})",
        )
    tensors = (weight.packed, factors.addresses, bias, out)
    devices = {tiles, *(tensor.device for tensor in tensors if tensor is not None)}
    if devices != {x.device}:
        raise ShapeMismatch(
            "The operands are on several devices.",
            found=", ".join(sorted(map(str, devices))),
            expected=str(x.device),
        )


def ungrouped(packed: torch.Tensor) -> torch.Tensor:
    """Bytes of the grouped order in bitsandbytes' order: uint8 ``[out * in / 2]``, a copy."""
    high, low = _nibbles(packed.reshape(-1, HALF_FEATURES))
    return _bytes(torch.cat((high, low), dim=1).view(-1, 2))


def _nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return packed >> 4, packed & 15


def _bytes(pairs: torch.Tensor) -> torch.Tensor:
    """``[n, 2]`` 4-bit codes → ``[n]`` bytes, the first in the high half."""
    return (pairs[:, 0] << 4 | pairs[:, 1]).contiguous()


def _check_operands(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    sizes = tuple(tensor.shape)
    if sizes != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        raise ShapeMismatch(
            f"The {name} has the wrong shape, type or layout.",
            found=f"{sizes} {tensor.dtype}, strides {tuple(tensor.stride())}",
            expected=f"contiguous {shape} {' or '.join(map(str, dtypes))}",
        )
    if tensor.device != device:
        raise ShapeMismatch(
            f"The {name} is on another device.", found=str(tensor.device), expected=str(device)
        )
