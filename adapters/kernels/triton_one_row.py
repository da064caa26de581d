"""A HiRA layer for one row, straight from 4-bit storage: what decides the time of a lone request.

    y = Σ_k b_k ⊙ (W0 (a_k ⊙ x)) + W0 x + bias

The fused kernel (``adapters.kernels.triton_ops``) makes B A, multiplies and dots sixteen rows, of
which one is wanted. Here each tile of W0 is decoded once and dotted with the expanded row
``a_k ⊙ x``, whose r columns are what the tensor cores want anyway; B is multiplied once at the end.
The input features are split over programs, whose parts are summed in a fixed order.
"""

# A kernel's parameters are positional, and their types are known where it is launched.
# ruff: noqa: PLR0917
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapters.kernels.triton_operands import FACTOR_COLUMNS, HALF_FEATURES, PackedWeight
from adapters.kernels.triton_ops import (
    INTERPRETED,
    SUM_BLOCK_FEATURES,
    decode_tile,
    decoder,
    device_limits,
    dot_rounded,
    factors_at,
    load_b,
    sum_parts_kernel,
)
from adapters.kernels.triton_tiles import one_row_blocks, split_inputs


@triton.jit
def _expanded_dot(
    weight, x, a_ptr, rank, columns, inside, total, K,
    R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """total + weight (a ⊙ x)ᵀ at ``columns``, in the type of ``weight``: float32 ``[BN, R]``."""
    r = tl.arange(0, R)
    mask = inside[:, None] & (r < rank)[None, :]
    a = tl.load(a_ptr + r[None, :] * K + columns[:, None], mask=mask, other=0.0)
    return dot_rounded(weight, (a.to(tl.float32) * x[:, None]).to(weight.dtype), total, EXACT)


@triton.jit(
    do_not_specialize=["layer", "LAYERS"],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def one_row_kernel(
    x_ptr, part_ptr, packed_ptr, level_ptr, scale_ptr,
    table_ptr, layer, LAYERS, slots_ptr, split_features, N, K,
    BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    GROUPED: tl.constexpr, EXACT: tl.constexpr, DECODER: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """part[split] = the sum over the split's inputs, for a block of output features."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    slot = tl.load(slots_ptr)
    a_ptr, b_ptr, rank = factors_at(table_ptr, slot, layer, LAYERS, x_ptr, COLUMNS)
    expanded = tl.full((BN, R), 0.0, tl.float32)
    # The tensor cores want sixteen columns: the sum with x itself is in the first.
    column = tl.arange(0, 16)
    plain = tl.full((BN, 16), 0.0, tl.float32)
    dtype: tl.constexpr = tl.float32 if EXACT else x_ptr.dtype.element_ty
    start = split * split_features
    stop = tl.minimum(start + split_features, K)
    for first in tl.range(start, stop, 2 * HALF, num_stages=STAGES):
        high, low, k_high, k_low, inside = decode_tile(
            packed_ptr, level_ptr, scale_ptr, n, first, N, K, HALF, BLOCK, GROUPED, DECODER,
        )  # fmt: skip
        x_high = tl.load(x_ptr + k_high, mask=inside, other=0.0).to(tl.float32)
        x_low = tl.load(x_ptr + k_low, mask=inside, other=0.0).to(tl.float32)
        first_high = tl.where(column[None, :] == 0, x_high[:, None], 0.0)
        first_low = tl.where(column[None, :] == 0, x_low[:, None], 0.0)
        high, low = high.to(dtype), low.to(dtype)
        plain = dot_rounded(high, first_high.to(dtype), plain, EXACT)
        plain = dot_rounded(low, first_low.to(dtype), plain, EXACT)
        expanded = _expanded_dot(high, x_high, a_ptr, rank, k_high, inside, expanded, K, R, EXACT)
        expanded = _expanded_dot(low, x_low, a_ptr, rank, k_low, inside, expanded, K, R, EXACT)
    b = load_b(b_ptr, rank, n, N, R).to(tl.float32)
    # Over the ranks by a product, too: that the interpreter and the compiler both know.
    ones = tl.where(column[None, :] + 0 * tl.arange(0, R)[:, None] == 0, 1.0, 0.0)
    total = tl.dot(expanded * b, ones, plain, input_precision="ieee")
    at = part_ptr + split.to(tl.int64) * N + n[:, None] + 0 * column[None, :]
    tl.store(at, total, mask=(n < N)[:, None] & (column == 0)[None, :])


def one_row_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    rank: int,
    first_row: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A layer for one row; nothing is checked and nothing is read on the host.

    Args:
        x: ``[1, in]``, bfloat16 or float16, features contiguous.
        weight: W0 ``[out, in]``.
        addresses: int64 ``[slots, layers, 3]``, as ``FactorTable.addresses``.
        layer: Of ``addresses``.
        slots: int32 ``[1]``: the row's; a slot without factors here is as the base.
        rank: Padded, at least 16 and at least the slot's.
        first_row: int32 ``[1]``, 0: where the row is in the answer.
        bias: ``[out]``, any float type, or None.

    Returns:
        A new ``[1, out]`` in the dtype of ``x``.
    """
    out_features, in_features = weight.shape
    multiprocessors, _ = device_limits(x.device)
    blocks = one_row_blocks(rank)
    out_blocks = triton.cdiv(out_features, blocks.out)
    splits, split_features = split_inputs(in_features, out_blocks, multiprocessors)
    parts = x.new_empty((splits, 1, out_features), dtype=torch.float32)
    one_row_kernel[(out_blocks, splits)](
        x, parts, weight.packed, weight.levels, weight.scales, addresses, layer,
        addresses.shape[1], slots, split_features, out_features, in_features,
        BN=blocks.out, HALF=HALF_FEATURES, R=rank, BLOCK=weight.block, GROUPED=weight.grouped,
        EXACT=INTERPRETED, DECODER=decoder(weight.kind, x.device), COLUMNS=FACTOR_COLUMNS,
        STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    y = x.new_empty(1, out_features)
    sum_parts_kernel[(1, triton.cdiv(out_features, SUM_BLOCK_FEATURES))](
        parts, y, x if bias is None else bias, first_row, 1, splits, out_features,
        BLOCK_N=SUM_BLOCK_FEATURES, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return y
