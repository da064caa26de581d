"""The fused GPU kernel: y = x (W0 ⊙ (1 + B A))ᵀ + bias from 4-bit storage, many slots a call.

A tile of W0 is decoded in registers, multiplied by 1 + a tile of B A that the tensor cores have
just made, and dotted with the rows of its slot; no dense weight reaches GPU memory. Import
this module where there is a CUDA device and triton is installed.
LoRA's two thin products stay with ``adapters.kernels.torch_ops``.

Two kernels, one equation:

- *many rows of a slot* (prefill): a program owns ``[block_out, block_rows]`` of y, all its rows of
  one slot. It runs along the input features as flash attention runs along the keys: B stays, while
  A, x and W0 stream past. The modulation costs 2·r flops a weight for every block of rows.
- *few rows of many slots* (decode): rows of several slots share one accumulator. A program decodes
  each tile of W0 once, dots it with all the rows, then adds each slot's W0 ⊙ (B A) to the columns
  of that slot. The input features are split over programs; a small second kernel adds the parts in
  a fixed order, so that an answer is reproducible.
"""

# A kernel's parameters are positional, and their types are known where it is launched.
# ruff: noqa: PLR0917
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl

from adapters.kernels.nibbles import FourBitKind, level_values, lookup_assembly
from adapters.kernels.triton_operands import (
    FACTOR_COLUMNS,
    HALF_FEATURES,
    KERNEL_MAX_RANK,
    FactorTable,
    PackedWeight,
    check_operands,
)
from adapters.kernels.triton_tiles import (
    LARGE_SHARED_BYTES,
    BatchTiles,
    FewRows,
    TokenTiles,
    few_blocks,
    many_blocks,
    split_inputs,
)

# Four bytes in; two registers of two float16 each for the high nibbles, two for the low ones.
ASM_REGISTERS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,r")
ASM_TYPES: tl.constexpr = tl.constexpr((tl.float16, tl.float16))
# Output features of a program of ``sum_parts_kernel``.
SUM_BLOCK_FEATURES = 256
# Ranks and inputs of a program of the LoRA kernels at one time.
LORA_BLOCK_RANK = 16
LORA_BLOCK_INPUTS = 128
# What differs from batch to batch, or between layers alike, is named in ``do_not_specialize``: its
# change must not compile a kernel anew.


@triton.jit
def dot_rounded(left, right, total, EXACT: tl.constexpr):
    """left · right + total in float32; EXACT does without the tensor cores' rounding."""
    if EXACT:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def decode_tile(
    packed_ptr, level_ptr, scale_ptr, n, first, N, K,
    HALF: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, DECODER: tl.constexpr,
):  # fmt: skip
    """W0[n, first : first + 2 HALF] in float32, as the halves of the high and of the low nibbles;
    then the input features of both halves, and which of them exist.

    GROUPED: the high nibbles are the first HALF columns, the low ones the rest, each within one
    block of scales. Otherwise bitsandbytes' order: even and odd columns, one scale a byte.
    """
    j = tl.arange(0, HALF)
    row = n.to(tl.int64) * K
    inside = n < N
    at = (row // 2 + first // 2)[:, None] + j[None, :]
    if GROUPED:  # in is a multiple of 2 HALF: nothing to mask
        k_high = first + j
        k_low = first + HALF + j
        exists = tl.full((HALF,), True, tl.int1)
    else:
        k_high = first + 2 * j
        k_low = k_high + 1
        exists = k_high < K
    mask = inside[:, None] & exists[None, :]
    byte = tl.load(packed_ptr + at, mask=mask, other=0)
    if DECODER != "":
        high, low = tl.inline_asm_elementwise(
            DECODER, ASM_REGISTERS, [byte], ASM_TYPES, is_pure=True, pack=4
        )
        high = high.to(tl.float32)
        low = low.to(tl.float32)
    else:
        code = byte.to(tl.int32)
        high = tl.load(level_ptr + (code >> 4))
        low = tl.load(level_ptr + (code & 15))
    if GROUPED:
        scale = tl.load(scale_ptr + (row + first) // BLOCK, mask=inside, other=0.0)
        high = high * scale[:, None]
        scale = tl.load(scale_ptr + (row + first + HALF) // BLOCK, mask=inside, other=0.0)
        low = low * scale[:, None]
    else:
        scale = tl.load(scale_ptr + at * 2 // BLOCK, mask=mask, other=0.0)
        high = high * scale
        low = low * scale
    return high, low, k_high, k_low, exists


@triton.jit
def factors_at(table_ptr, slot, layer, LAYERS, like_ptr, COLUMNS: tl.constexpr):
    """Where A ``[r, in]`` and Bᵀ ``[r, out]`` of this slot start, and r."""
    entry = table_ptr + (slot.to(tl.int64) * LAYERS + layer) * COLUMNS
    a_ptr = tl.multiple_of(tl.load(entry).to(like_ptr.dtype), 16)
    b_ptr = tl.multiple_of(tl.load(entry + 1).to(like_ptr.dtype), 16)
    return a_ptr, b_ptr, tl.load(entry + 2).to(tl.int32)


@triton.jit
def tile_modulation(
    a_ptr, b, rank, columns, inside, K,
    BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """B A at ``columns``: float32 ``[BN, HALF]``."""
    r = tl.arange(0, R)
    mask = (r < rank)[:, None] & inside[None, :]
    a = tl.load(a_ptr + r[:, None] * K + columns[None, :], mask=mask, other=0.0)
    return dot_rounded(b, a, tl.full((BN, HALF), 0.0, tl.float32), EXACT)


@triton.jit
def load_b(b_ptr, rank, n, N, R: tl.constexpr):
    """B at the output features ``n``: ``[BN, R]``."""
    r = tl.arange(0, R)
    mask = (n < N)[:, None] & (r < rank)[None, :]
    return tl.load(b_ptr + r[None, :] * N + n[:, None], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["layer", "LAYERS", "tile_count"],
    do_not_specialize_on_alignment=["rows_ptr", "tiles_ptr"],
)
def many_rows_kernel(
    x_ptr, x_stride, y_ptr, bias_ptr,
    packed_ptr, level_ptr, scale_ptr,
    table_ptr, layer, LAYERS, rows_ptr, tiles_ptr, tile_count, N, K,
    BM: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, DECODER: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a block of W0 and differ in their rows.
    tile = tiles_ptr + (tl.program_id(0) % tile_count) * 3
    n = (tl.program_id(0) // tile_count) * BN + tl.arange(0, BN)
    slot, start, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    # Only a fixed number of tiles has some without rows; the branch costs the others registers.
    if SPARE:  # noqa: SIM102  # decided when it is compiled, and the next when it runs
        if count == 0:
            return
    m = tl.arange(0, BM)
    rows = tl.load(rows_ptr + start + m, mask=m < count, other=0).to(tl.int64)
    x_rows = (x_ptr + rows * x_stride)[None, :]
    x_mask = (m < count)[None, :]
    dtype: tl.constexpr = tl.float32 if EXACT else x_ptr.dtype.element_ty
    if R > 0:
        a_ptr, b_ptr, rank = factors_at(table_ptr, slot, layer, LAYERS, x_ptr, COLUMNS)
        b = load_b(b_ptr, rank, n, N, R)
    total = tl.full((BN, BM), 0.0, tl.float32)
    for first in tl.range(0, K, 2 * HALF, num_stages=STAGES):
        high, low, k_high, k_low, inside = decode_tile(
            packed_ptr, level_ptr, scale_ptr, n, first, N, K, HALF, BLOCK, GROUPED, DECODER,
        )  # fmt: skip
        if R > 0:
            high += high * tile_modulation(a_ptr, b, rank, k_high, inside, K, BN, HALF, R, EXACT)
            low += low * tile_modulation(a_ptr, b, rank, k_low, inside, K, BN, HALF, R, EXACT)
        x = tl.load(x_rows + k_high[:, None], mask=x_mask & inside[:, None], other=0.0)
        total = dot_rounded(high.to(dtype), x, total, EXACT)
        x = tl.load(x_rows + k_low[:, None], mask=x_mask & inside[:, None], other=0.0)
        total = dot_rounded(low.to(dtype), x, total, EXACT)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (m < count)[:, None] & (n < N)[None, :]
    y = tl.trans(total).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + n[None, :], y, mask=mask)


@triton.jit(
    do_not_specialize=["layer", "LAYERS", "row_count"],
    do_not_specialize_on_alignment=["rows_ptr", "entries_ptr", "bounds_ptr"],
)
def few_rows_kernel(
    x_ptr, x_stride, part_ptr,
    packed_ptr, level_ptr, scale_ptr,
    table_ptr, layer, LAYERS, rows_ptr, row_count, entries_ptr, bounds_ptr, split_features, N, K,
    BM: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr, EXACT: tl.constexpr, DECODER: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    place = tile * BM + m
    rows = tl.load(rows_ptr + place, mask=place < row_count, other=0).to(tl.int64)
    x_rows = (x_ptr + rows * x_stride)[None, :]
    x_mask = (place < row_count)[None, :]
    dtype: tl.constexpr = tl.float32 if EXACT else x_ptr.dtype.element_ty
    first_entry, last_entry = tl.load(bounds_ptr + tile), tl.load(bounds_ptr + tile + 1)
    total = tl.full((BN, BM), 0.0, tl.float32)
    start = split * split_features
    for first in tl.range(start, tl.minimum(start + split_features, K), 2 * HALF, num_stages=1):
        high, low, k_high, k_low, inside = decode_tile(
            packed_ptr, level_ptr, scale_ptr, n, first, N, K, HALF, BLOCK, GROUPED, DECODER,
        )  # fmt: skip
        x_high = tl.load(x_rows + k_high[:, None], mask=x_mask & inside[:, None], other=0.0)
        x_low = tl.load(x_rows + k_low[:, None], mask=x_mask & inside[:, None], other=0.0)
        total = dot_rounded(high.to(dtype), x_high, total, EXACT)
        total = dot_rounded(low.to(dtype), x_low, total, EXACT)
        for entry in tl.range(first_entry, last_entry, num_stages=STAGES):
            slot = tl.load(entries_ptr + entry * 3)
            a_ptr, b_ptr, rank = factors_at(table_ptr, slot, layer, LAYERS, x_ptr, COLUMNS)
            b = load_b(b_ptr, rank, n, N, R)
            product = high * tile_modulation(a_ptr, b, rank, k_high, inside, K, BN, HALF, R, EXACT)
            part = tl.full((BN, BM), 0.0, tl.float32)
            part = dot_rounded(product.to(dtype), x_high, part, EXACT)
            product = low * tile_modulation(a_ptr, b, rank, k_low, inside, K, BN, HALF, R, EXACT)
            part = dot_rounded(product.to(dtype), x_low, part, EXACT)
            # Chosen, not multiplied by 0: an overflow of one slot must not reach another's rows.
            own = m >= tl.load(entries_ptr + entry * 3 + 1)
            own = own & (m < tl.load(entries_ptr + entry * 3 + 2))
            total = tl.where(own[None, :], total + part, total)
    at = part_ptr + (split.to(tl.int64) * row_count + place)[:, None] * N + n[None, :]
    mask = (place < row_count)[:, None] & (n < N)[None, :]
    tl.store(at, tl.trans(total), mask=mask)


@triton.jit(
    do_not_specialize=["row_count", "splits"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def sum_parts_kernel(
    part_ptr, y_ptr, bias_ptr, rows_ptr, row_count, splits, N,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    for split in range(splits):
        at = part_ptr + (split * row_count + place).to(tl.int64) * N
        total += tl.load(at + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + place).to(tl.int64)
    tl.store(y_ptr + row * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(
    do_not_specialize=["layer", "LAYERS"],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def lora_down_kernel(
    x_ptr, x_stride, inner_ptr, slots_ptr, table_ptr, layer, LAYERS, K,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """inner[row, r] = A_r · x: a block of ranks of one row."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    a_ptr, _, rank = factors_at(table_ptr, tl.load(slots_ptr + row), layer, LAYERS, x_ptr, COLUMNS)
    # The tensor cores want sixteen columns: the row's own is the first.
    column = tl.arange(0, 16)
    total = tl.full((BLOCK_R, 16), 0.0, tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        own = (k < K)[:, None] & (column == 0)[None, :]
        at = x_ptr + row * x_stride + k[:, None] + 0 * column[None, :]
        x = tl.load(at, mask=own, other=0.0)
        mask = (r < rank)[:, None] & (k < K)[None, :]
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=mask, other=0.0)
        total = dot_rounded(a, x, total, EXACT)
    at = inner_ptr + row * R + r[:, None] + 0 * column[None, :]
    inside = (r < R)[:, None] & (column == 0)[None, :]
    tl.store(at, total, mask=inside)


@triton.jit(
    do_not_specialize=["layer", "LAYERS"],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def lora_up_kernel(
    y_ptr, inner_ptr, slots_ptr, table_ptr, scale_ptr, layer, LAYERS, N,
    R: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[row, n] += s Σ_r inner[row, r] B[n, r]: a block of outputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots_ptr + row)
    _, b_ptr, rank = factors_at(table_ptr, slot, layer, LAYERS, y_ptr, COLUMNS)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    for r in range(rank):
        b = tl.load(b_ptr + r * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += tl.load(inner_ptr + row * R + r) * b
    scale = tl.load(scale_ptr + slot.to(tl.int64) * LAYERS + layer)
    y = tl.load(y_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    y += tl.where(rank > 0, scale * total, 0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def decode_bytes_kernel(byte_ptr, found_ptr, DECODER: tl.constexpr):
    """The float16 levels of 256 bytes: of the high nibbles, then of the low ones."""
    at = tl.arange(0, 256)
    high, low = tl.inline_asm_elementwise(
        DECODER, ASM_REGISTERS, [tl.load(byte_ptr + at)], ASM_TYPES, is_pure=True, pack=4
    )
    tl.store(found_ptr + at, high)
    tl.store(found_ptr + 256 + at, low)


# What a compiler raises where a kernel does not fit a device.
KernelFailure = triton.TritonError
# How the text begins of the plain RuntimeError that a launch raises, where the driver refuses it.
REFUSED_LAUNCH: Final = "Triton Error"

# Under TRITON_INTERPRET=1 the kernels run on the CPU, whose dot takes bfloat16 bits for integers.
INTERPRETED = not isinstance(many_rows_kernel, triton.JITFunction)


def hira_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    factors: FactorTable,
    layer: int,
    batch: BatchTiles,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A HiRA linear layer of a mixed batch, straight from 4-bit storage.

    y[m] = x[m] (W0 ⊙ (1 + B_s A_s))ᵀ + bias,  s the slot of row m; the base's rows have B A = 0.

    W0 ⊙ (1 + B A) is made in float32 and rounded once, to the dtype of x; sums are in float32. The
    levels of W0 are looked up as float16 (``nibbles``). One launch for each padded rank of slots
    with many rows, two for all slots with few; no synchronization, no copy after a batch's first
    layer, and no memory but y and ``[splits, few rows, out]`` in float32.

    Args:
        x: ``[rows, in]``, bfloat16 or float16, features contiguous, on the current CUDA device.
        weight: W0 ``[out, in]``.
        factors: Factors of x's dtype, by slot; a slot without any in this layer is as the base.
        layer: The index of this layer in ``factors``.
        batch: The tiles of the batch's segments, shared by all layers.
        bias: ``[out]``, any float type. A slot's own bias is the caller's to add.
        out: Where to write: contiguous ``[rows, out]``, any float type, apart from x. None: a new
            tensor of x's dtype.

    Returns:
        ``out``, or the new ``[rows, out]``.

    Raises:
        SegmentMismatch: The segments do not cover the rows of x.
        SlotNotResident: A segment's slot holds nothing.
        ShapeMismatch: Shapes, types or devices that do not belong together. In all three cases
            nothing was written.
    """
    check_operands(x, weight, factors, layer, tiles=batch.device, bias=bias, out=out)
    batch.segments.check_covers(x.shape[0])
    launches = batch.launches(factors, layer)
    y = out if out is not None else x.new_empty(x.shape[0], weight.shape[0])
    has_bias = bias is not None
    bias = x if bias is None else bias  # a pointer that is not read
    source, settings = _of_weight(weight, factors.addresses, layer, len(factors.layers), x.device)
    for many in launches.many:
        _launch_many(
            x, y, bias, has_bias, TokenTiles(launches.rows, many), weight, source, settings
        )  # fmt: skip
    if launches.few is not None:
        _launch_few(x, y, bias, has_bias, launches.few, weight.shape, source, settings)
    return y


def few_rows_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    few: FewRows,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``hira_linear`` for rows whose tiles are in buffers that change between launches.

    Nothing is checked and nothing is read on the host: what ``few`` and ``addresses`` hold counts
    when the launch runs, so a captured launch serves whatever is written to them later.

    Args:
        x: ``[rows, in]``, as for ``hira_linear``.
        weight: W0 ``[out, in]``.
        addresses: int64 ``[slots, layers, 3]``.
        layer: Of ``addresses``.
        few: Tiles that hold every row.
        bias: ``[out]`` or None.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    source, settings = _of_weight(weight, addresses, layer, addresses.shape[1], x.device)
    has_bias = bias is not None
    _launch_few(
        x, y, x if bias is None else bias, has_bias, few, weight.shape, source, settings
    )  # fmt: skip
    return y


def token_rows_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    tiles: TokenTiles,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``few_rows_linear`` for many rows of each slot: a tile is of one slot.

    Args:
        x, weight, addresses, layer, bias: As there.
        tiles: That hold every row; slots of a smaller rank than theirs are among them.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    source, settings = _of_weight(weight, addresses, layer, addresses.shape[1], x.device)
    has_bias = bias is not None
    _launch_many(
        x, y, x if bias is None else bias, has_bias, tiles, weight, source, settings, spare=True
    )
    return y


def _launch_many(
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor,
    has_bias: bool,
    tiles: TokenTiles,
    weight: PackedWeight,
    source: tuple[Any, ...],
    settings: dict[str, Any],
    *,
    spare: bool = False,
) -> None:
    """``spare``: some of the tiles may have no rows."""
    (out_features, in_features), many = weight.shape, tiles.many
    _, shared_bytes = device_limits(x.device)
    blocks = many_blocks(many.rank, weight.grouped, shared_bytes, many.block_rows)
    many_rows_kernel[(many.count * triton.cdiv(out_features, blocks.out),)](
        x, x.stride(0), y, bias, *source, tiles.rows, many.tiles, many.count,
        out_features, in_features, BM=many.block_rows, BN=blocks.out, R=many.rank,
        HAS_BIAS=has_bias, STAGES=blocks.stages, SPARE=spare, num_warps=blocks.warps, **settings,
    )  # fmt: skip


def _of_weight(
    weight: PackedWeight, addresses: torch.Tensor, layer: int, layers: int, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels read of a weight and of the table, in the order of their parameters."""
    source = (
        *(weight.packed, weight.levels, weight.scales),
        *(addresses, layer, layers),
    )
    settings: dict[str, Any] = {
        "HALF": HALF_FEATURES,
        "BLOCK": weight.block,
        "GROUPED": weight.grouped,
        "EXACT": INTERPRETED,
        "DECODER": decoder(weight.kind, device),
        "COLUMNS": FACTOR_COLUMNS,
    }
    return source, settings


def _launch_few(
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor,
    has_bias: bool,
    few: FewRows,
    shape: tuple[int, int],
    source: tuple[Any, ...],
    settings: dict[str, Any],
) -> None:
    out_features, in_features = shape
    multiprocessors, _ = device_limits(x.device)
    blocks = few_blocks(few.rank)
    out_blocks = triton.cdiv(out_features, blocks.out)
    splits, split_features = split_inputs(in_features, few.tiles * out_blocks, multiprocessors)
    parts = x.new_empty((splits, few.row_count, out_features), dtype=torch.float32)
    few_rows_kernel[(few.tiles, out_blocks, splits)](
        x, x.stride(0), parts, *source, few.rows, few.row_count, few.entries, few.bounds,
        split_features, out_features, in_features, BM=few.block_rows, BN=blocks.out,
        R=few.rank, STAGES=blocks.stages, num_warps=blocks.warps, **settings,
    )  # fmt: skip
    sum_parts_kernel[(few.row_count, triton.cdiv(out_features, SUM_BLOCK_FEATURES))](
        parts, y, bias, few.rows, few.row_count, splits, out_features,
        BLOCK_N=SUM_BLOCK_FEATURES, HAS_BIAS=has_bias,
    )  # fmt: skip


def add_lora_rows(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    addresses: torch.Tensor,
    scales: torch.Tensor,
    layer: int,
) -> None:
    """y[t] += s (x[t] Aᵀ) Bᵀ with the factors of row t's slot, found by address; adds to ``y``.

    Args:
        y: ``[rows, out]``, contiguous.
        x: ``[rows, in]``, features contiguous.
        slots: int32 ``[rows]``; a slot whose rank is 0 in ``addresses`` adds nothing.
        addresses: int64 ``[slots, layers, 3]`` of LoRA factors.
        scales: float32 ``[slots, layers]``.
        layer: Of the tables.
    """
    rows, layers = x.shape[0], addresses.shape[1]
    most = KERNEL_MAX_RANK
    inner = x.new_empty((rows, most), dtype=torch.float32)
    lora_down_kernel[(rows, most // LORA_BLOCK_RANK)](
        x, x.stride(0), inner, slots, addresses, layer, layers, x.shape[1], R=most,
        BLOCK_R=LORA_BLOCK_RANK, BLOCK_K=LORA_BLOCK_INPUTS, COLUMNS=FACTOR_COLUMNS,
        EXACT=INTERPRETED,
    )  # fmt: skip
    lora_up_kernel[(rows, triton.cdiv(y.shape[1], SUM_BLOCK_FEATURES))](
        y, inner, slots, addresses, scales, layer, layers, y.shape[1], R=most,
        BLOCK_N=SUM_BLOCK_FEATURES, COLUMNS=FACTOR_COLUMNS,
    )  # fmt: skip


@lru_cache(maxsize=32)
def decoder(kind: FourBitKind, device: torch.device) -> str:
    """The PTX that decodes nibbles on this device, or "" for a table in memory.

    The PTX is used only if it decodes all 256 bytes as the table does; synchronizes, once.
    """
    if INTERPRETED or torch.version.cuda is None:
        return ""
    with torch.inference_mode(False):
        assembly = lookup_assembly(kind)
        byte = torch.arange(256, dtype=torch.uint8, device=device)
        found = torch.empty(2, 256, dtype=torch.float16, device=device)
        decode_bytes_kernel[(1,)](byte, found, DECODER=assembly)
        levels = torch.tensor(level_values(kind), device=device).to(torch.float16)
        wanted = levels[torch.stack((byte >> 4, byte & 15)).long()]
        return assembly if torch.equal(found, wanted) else ""


@lru_cache(maxsize=32)
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 4, LARGE_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
