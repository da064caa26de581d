"""HiRA layers with the weight in scratch memory, decoded or modulated once, then a library product.

Where the fused kernel makes tensor-core operands of 4-bit tiles again for every adapter, here W0 is
written out once and cuBLAS does the rest. Two forms of the same equation:

    product   e = [x; a_1 ⊙ x; ...; a_r ⊙ x] W0ᵀ,   y = e_0 + Σ_k b_k ⊙ e_k + bias
    scratch   W = W0 + W0 ⊙ (B_s A_s) of one slot,  y[rows of s] = x[rows of s] Wᵀ + bias

``product`` is for few rows of many slots, ``scratch`` for many rows of few. The product is made in
blocks of a fixed number of rows, so a row does not depend on how many there are. Which of these and
of ``adapters.kernels.triton_ops`` is used is decided by timing them.
"""

# A kernel's parameters are positional, and their types are known where it is launched.
# ruff: noqa: PLR0917
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

from adapters.kernels.form_buffers import PRODUCT_ROWS, Take, product_buffers
from adapters.kernels.triton_operands import FACTOR_COLUMNS, HALF_FEATURES, PackedWeight
from adapters.kernels.triton_ops import (
    INTERPRETED,
    decode_tile,
    decoder,
    factors_at,
    load_b,
    tile_modulation,
)

# Output features of a program of each kernel, and inputs of the expanding one.
WEIGHT_BLOCK: Final = 64
EXPAND_BLOCK: Final = 1024
CONTRACT_BLOCK: Final = 256


@triton.jit(do_not_specialize=["layer", "LAYERS", "slot"])
def scratch_weight_kernel(
    out_ptr, packed_ptr, level_ptr, scale_ptr, table_ptr, layer, LAYERS, slot, N, K,
    BN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    GROUPED: tl.constexpr, EXACT: tl.constexpr, DECODER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = W0, or W0 + W0 ⊙ (B A) of a slot where R is not 0: a tile of it."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * 2 * HALF
    high, low, k_high, k_low, inside = decode_tile(
        packed_ptr, level_ptr, scale_ptr, n, first, N, K, HALF, BLOCK, GROUPED, DECODER
    )
    if R > 0:
        a_ptr, b_ptr, rank = factors_at(table_ptr, slot, layer, LAYERS, out_ptr, COLUMNS)
        b = load_b(b_ptr, rank, n, N, R)
        high += high * tile_modulation(a_ptr, b, rank, k_high, inside, K, BN, HALF, R, EXACT)
        low += low * tile_modulation(a_ptr, b, rank, k_low, inside, K, BN, HALF, R, EXACT)
    mask = (n < N)[:, None] & inside[None, :]
    row = out_ptr + n.to(tl.int64)[:, None] * K
    tl.store(row + k_high[None, :], high.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(row + k_low[None, :], low.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["layer", "LAYERS", "row_count"],
    do_not_specialize_on_alignment=["slots_ptr"],
)
def expand_rows_kernel(
    x_ptr, x_stride, z_ptr, slots_ptr, row_count, table_ptr, layer, LAYERS, K,
    EACH: tl.constexpr, PLAIN: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z[t · EACH + k] = a_k ⊙ x[t], of k from 1; zeros beyond the rank of t's slot, and beyond
    the last row.

    PLAIN: before them z[t · EACH] = x[t]; otherwise z begins with k = 1.
    """
    row, k = tl.program_id(0) // EACH, tl.program_id(0) % EACH + (not PLAIN)
    i = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row = row < row_count
    slot = tl.load(slots_ptr + row, mask=is_row, other=0)
    a_ptr, _, rank = factors_at(table_ptr, slot, layer, LAYERS, x_ptr, COLUMNS)
    x_at = x_ptr + row.to(tl.int64) * x_stride + i
    x = tl.load(x_at, mask=(i < K) & is_row, other=0.0).to(tl.float32)
    has_factor = (k > 0) & (k <= rank)
    at = tl.where(has_factor, k - 1, 0).to(tl.int64) * K
    a = tl.load(a_ptr + at + i, mask=(i < K) & has_factor, other=0.0).to(tl.float32)
    value = tl.where(k == 0, x, tl.where(has_factor, a * x, 0.0))
    at = tl.program_id(0).to(tl.int64) * K
    tl.store(z_ptr + at + i, value.to(z_ptr.dtype.element_ty), mask=i < K)


@triton.jit(do_not_specialize=["layer", "LAYERS"], do_not_specialize_on_alignment=["slots_ptr"])
def contract_rows_kernel(
    y_ptr, e_ptr, bias_ptr, slots_ptr, table_ptr, layer, LAYERS, N,
    EACH: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[t] = e[t · EACH] + Σ_k b_k ⊙ e[t · EACH + k] + bias, k up to the rank of t's slot."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, b_ptr, rank = factors_at(table_ptr, tl.load(slots_ptr + row), layer, LAYERS, y_ptr, COLUMNS)
    first = e_ptr + (row * EACH).to(tl.int64) * N
    total = tl.load(first + n, mask=n < N, other=0.0).to(tl.float32)
    # Terms beyond the rank are not read: an overflow of one slot must not reach another's rows.
    for k in range(rank):
        e = tl.load(first + (k + 1) * N + n, mask=n < N, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + k * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += b * e
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * N
    tl.store(y_ptr + at + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


def write_weight(
    out: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    slot: int,
    rank: int,
) -> None:
    """out = W0 ⊙ (1 + B_s A_s), rounded once; writes ``out``.

    Args:
        out: ``[out, in]``, contiguous, in the dtype of the factors.
        weight: W0.
        addresses: int64 ``[slots, layers, 3]``, as ``FactorTable.addresses``.
        layer: Of ``addresses``.
        slot: Whose factors; any where ``rank`` is 0.
        rank: Padded, at least the slot's; 0 writes W0 itself.
    """
    out_features, in_features = weight.shape
    groups = triton.cdiv(in_features, 2 * HALF_FEATURES)
    scratch_weight_kernel[(triton.cdiv(out_features, WEIGHT_BLOCK), groups)](
        out, weight.packed, weight.levels, weight.scales, addresses, layer, addresses.shape[1],
        slot, out_features, in_features, BN=WEIGHT_BLOCK, HALF=HALF_FEATURES, R=rank,
        BLOCK=weight.block, GROUPED=weight.grouped, EXACT=INTERPRETED,
        DECODER=decoder(weight.kind, out.device), COLUMNS=FACTOR_COLUMNS, num_warps=8,
    )  # fmt: skip


def product_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    rank: int,
    take: Take,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A layer for few rows of many slots, by one expansion and one decoded W0.

    Args:
        x: ``[rows, in]``, features contiguous.
        weight: W0 ``[out, in]``.
        addresses, layer: Where the factors are.
        slots: int32 ``[rows]``.
        rank: Of the slots, at least the largest.
        take: Gives the buffers.
        bias: ``[out]``, any float type, or None.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``.
    """
    rows, in_features = x.shape
    out_features, each, layers = weight.shape[0], rank + 1, addresses.shape[1]
    w0, z, e = product_buffers(weight.shape, rows, rank, x.dtype, take)
    write_weight(w0, weight, addresses, layer, 0, 0)
    blocks = z.shape[0] // PRODUCT_ROWS
    expand_rows_kernel[(rows * each, triton.cdiv(in_features, EXPAND_BLOCK))](
        x, x.stride(0), z, slots, rows, addresses, layer, layers, in_features,
        EACH=each, PLAIN=True, BLOCK_K=EXPAND_BLOCK, COLUMNS=FACTOR_COLUMNS,
    )  # fmt: skip
    for block in range(blocks):
        rows_of = slice(block * PRODUCT_ROWS, (block + 1) * PRODUCT_ROWS)
        _product(z[rows_of], w0, e[rows_of])
    y = x.new_empty(rows, out_features)
    contract_rows_kernel[(rows, triton.cdiv(out_features, CONTRACT_BLOCK))](
        y, e, x if bias is None else bias, slots, addresses, layer, layers, out_features,
        EACH=each, BLOCK_N=CONTRACT_BLOCK, HAS_BIAS=bias is not None, COLUMNS=FACTOR_COLUMNS,
    )  # fmt: skip
    return y


def scratch_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    addresses: torch.Tensor,
    layer: int,
    pieces: Sequence[tuple[int, int, int, int]],
    *,
    take: Take,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A layer for many rows of each slot: its modulated weight in scratch, then a library product.

    Args:
        x: ``[rows, in]``.
        weight: W0 ``[out, in]``.
        addresses, layer: Where the factors are.
        pieces: Slot, padded rank, first row and the one after the last, covering all rows.
        take: Gives the buffer.
        bias: ``[out]`` in the dtype of ``x``, or None.

    Returns:
        A new ``[rows, out]`` in the dtype of ``x``.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    room = take("scratch_w0", weight.shape, x.dtype)
    written: int | None = None
    for slot, rank, start, stop in sorted(pieces, key=lambda one: (one[1] > 0, one[0])):
        wanted = slot if rank else 0
        if written != wanted:
            write_weight(room, weight, addresses, layer, slot, rank)
            written = wanted
        if bias is None:
            torch.mm(x[start:stop], room.t(), out=y[start:stop])
        else:
            torch.addmm(bias, x[start:stop], room.t(), out=y[start:stop])
    return y


def _product(z: torch.Tensor, w0: torch.Tensor, e: torch.Tensor) -> None:
    """e = z W0ᵀ with float32 sums, left in float32."""
    if z.device.type == "cuda" and z.dtype != torch.float32:
        torch.mm(z, w0.t(), out_dtype=torch.float32, out=e)
    else:
        torch.mm(z.float(), w0.float().t(), out=e)
