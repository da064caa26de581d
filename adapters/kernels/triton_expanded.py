"""HiRA layers for few rows of many slots: 4-bit tiles against rows that their factors expanded.

    z[t, k] = a_k ⊙ x[t],   y[t] = Σ_k b_k ⊙ (W0 z[t, k]) + W0 x[t] + bias,   of t's slot

W0 is the left operand of the tensor cores, in registers: a tile is decoded once for all rows of a
program, whatever their slots, and never made an operand again, as the fused kernel must for each
modulation. The expanded rows, which are few, are written once and stream past; B is multiplied and
summed over the ranks at the end. Unlike the library product of ``adapters.kernels.triton_scratch``,
neither W0 nor the products go through memory. The input features are split over programs, whose
parts are added in a fixed order.
"""

# A kernel's parameters are positional, and their types are known where it is launched.
# ruff: noqa: PLR0917
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from adapters.kernels.form_buffers import Take, expanded_buffer
from adapters.kernels.triton_operands import FACTOR_COLUMNS, HALF_FEATURES, PackedWeight
from adapters.kernels.triton_ops import (
    INTERPRETED,
    SUM_BLOCK_FEATURES,
    decode_tile,
    decoder,
    device_limits,
    dot_rounded,
    sum_parts_kernel,
)
from adapters.kernels.triton_scratch import EXPAND_BLOCK, expand_rows_kernel
from adapters.kernels.triton_tiles import EXPANDED_COLUMNS, expanded_blocks, split_inputs

# Programs of a multiprocessor: they are large, and each reads B anew.
PROGRAMS: Final = 2


@triton.jit(
    do_not_specialize=["layer", "LAYERS", "row_count"],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def expanded_rows_kernel(
    x_ptr, x_stride, z_ptr, part_ptr, packed_ptr, level_ptr, scale_ptr,
    table_ptr, layer, LAYERS, slots_ptr, row_count, split_features, N, K,
    TOKENS: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, GROUPED: tl.constexpr, EXACT: tl.constexpr, DECODER: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """part[2 split] = the split's part of W0 x, part[2 split + 1] that of Σ_k b_k ⊙ (W0 z_k)."""
    tile, split = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.arange(0, TOKENS * R)
    z_rows = (z_ptr + (tile * TOKENS * R + column).to(tl.int64) * K)[None, :]
    # The tensor cores want sixteen columns: the rows of x themselves are the first of them.
    m = tl.arange(0, 16)
    x_mask = ((m < TOKENS) & (tile * TOKENS + m < row_count))[None, :]
    x_rows = (x_ptr + (tile * TOKENS + m).to(tl.int64) * x_stride)[None, :]
    dtype: tl.constexpr = tl.float32 if EXACT else x_ptr.dtype.element_ty
    plain = tl.full((BN, 16), 0.0, tl.float32)
    total = tl.full((BN, TOKENS * R), 0.0, tl.float32)
    start = split * split_features
    stop = tl.minimum(start + split_features, K)
    for first in tl.range(start, stop, 2 * HALF, num_stages=STAGES):
        high, low, k_high, k_low, inside = decode_tile(
            packed_ptr, level_ptr, scale_ptr, n, first, N, K, HALF, BLOCK, GROUPED, DECODER,
        )  # fmt: skip
        high, low = high.to(dtype), low.to(dtype)
        # What stands for no row of the batch is zeros, and columns do not mix.
        z = tl.load(z_rows + k_high[:, None], mask=inside[:, None], other=0.0)
        total = dot_rounded(high, z, total, EXACT)
        z = tl.load(z_rows + k_low[:, None], mask=inside[:, None], other=0.0)
        total = dot_rounded(low, z, total, EXACT)
        x = tl.load(x_rows + k_high[:, None], mask=x_mask & inside[:, None], other=0.0)
        plain = dot_rounded(high, x, plain, EXACT)
        x = tl.load(x_rows + k_low[:, None], mask=x_mask & inside[:, None], other=0.0)
        plain = dot_rounded(low, x, plain, EXACT)
    part = part_ptr + (2 * split).to(tl.int64) * row_count * N
    at = part + (tile * TOKENS + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, plain, mask=(n < N)[:, None] & x_mask)
    token, k = tile * TOKENS + column // R, column % R
    slot = tl.load(slots_ptr + token, mask=token < row_count, other=0)
    entry = table_ptr + (slot.to(tl.int64) * LAYERS + layer) * COLUMNS
    rank = tl.where(token < row_count, tl.load(entry + 2), 0)
    b_rows = tl.load(entry + 1).to(x_ptr.dtype) + k.to(tl.int64) * N
    mask = (n < N)[:, None] & (k < rank)[None, :]
    b = tl.load(b_rows[None, :] + n[:, None], mask=mask, other=0.0)
    # Sums within each row's own columns: an overflow of one slot must not reach another's rows.
    of_rows = total * b.to(tl.float32)
    for halving in tl.static_range(HALVINGS):
        pairs = tl.reshape(of_rows, (BN, (TOKENS * R) >> (halving + 1), 2))
        even, odd = tl.split(pairs)
        of_rows = even + odd
    own = tile * TOKENS + tl.arange(0, TOKENS)
    at = part + (row_count + own).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, of_rows, mask=(n < N)[:, None] & (own < row_count)[None, :])


def expanded_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    rank: int,
    order: torch.Tensor,
    take: Take,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A layer for few rows of many slots; nothing is checked and nothing is read on the host.

    Args:
        x: ``[rows, in]``, bfloat16 or float16, features contiguous.
        weight: W0 ``[out, in]``.
        addresses: int64 ``[slots, layers, 3]``, as ``FactorTable.addresses``.
        layer: Of ``addresses``.
        slots: int32 ``[rows]``; a slot without factors here is as the base.
        rank: Padded, at least 16 and at least the largest of the slots.
        order: int32 ``[rows]``: 0, 1, 2, ...
        take: Gives the buffer.
        bias: ``[out]``, any float type, or None.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``.
    """
    rows, in_features = x.shape
    out_features, layers = weight.shape[0], addresses.shape[1]
    z = expanded_buffer(weight.shape, rows, rank, x.dtype, take)
    expand_rows_kernel[(len(z), triton.cdiv(in_features, EXPAND_BLOCK))](
        x, x.stride(0), z, slots, rows, addresses, layer, layers, in_features,
        EACH=rank, PLAIN=False, BLOCK_K=EXPAND_BLOCK, COLUMNS=FACTOR_COLUMNS,
    )  # fmt: skip
    multiprocessors, shared_bytes = device_limits(x.device)
    blocks = expanded_blocks(shared_bytes)
    tiles, out_blocks = len(z) // EXPANDED_COLUMNS, triton.cdiv(out_features, blocks.out)
    splits, split_features = split_inputs(
        in_features, tiles * out_blocks, multiprocessors, each=PROGRAMS
    )
    parts = x.new_empty((2 * splits, rows, out_features), dtype=torch.float32)
    expanded_rows_kernel[(tiles, out_blocks, splits)](
        x, x.stride(0), z, parts, weight.packed, weight.levels, weight.scales, addresses, layer,
        layers, slots, rows, split_features, out_features, in_features,
        TOKENS=EXPANDED_COLUMNS // rank, BN=blocks.out, HALF=HALF_FEATURES, R=rank,
        BLOCK=weight.block, GROUPED=weight.grouped, EXACT=INTERPRETED,
        DECODER=decoder(weight.kind, x.device), COLUMNS=FACTOR_COLUMNS, STAGES=blocks.stages,
        HALVINGS=rank.bit_length() - 1, num_warps=blocks.warps,
    )  # fmt: skip
    y = x.new_empty(rows, out_features)
    sum_parts_kernel[(rows, triton.cdiv(out_features, SUM_BLOCK_FEATURES))](
        parts, y, x if bias is None else bias, order, rows, 2 * splits, out_features,
        BLOCK_N=SUM_BLOCK_FEATURES, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return y
