"""The equations as written, in float64: the truth that every fast path is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapters.segments import Segments

# One entry per slot: (method, A, B, scale, bias or None).
ReferenceFactors = tuple[str, torch.Tensor, torch.Tensor, float, torch.Tensor | None]


def modulated_weight(
    w0: torch.Tensor, method: str, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W0 ⊙ (1 + B A) for HiRA, W0 + s B A for LoRA.

    Args:
        w0: ``[out, in]`` or, of a convolution, ``[out, in, *kernel]``.
        method: ``hira`` or ``lora``.
        a: ``[r, in]`` or ``[r, in, *kernel]``.
        b: ``[out, r]`` or ``[out, r, 1, ...]``.
        scale: LoRA's s.

    Returns:
        float64, shaped as ``w0``.
    """
    rank = a.shape[0]
    product = (b.double().reshape(-1, rank) @ a.double().reshape(rank, -1)).view(w0.shape)
    w0 = w0.double()
    return w0 + w0 * product if method == "hira" else w0 + scale * product


def modulated_linear(
    x: torch.Tensor,
    w0: torch.Tensor,
    slots: Mapping[int, ReferenceFactors],
    segments: Segments,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y[segment] = x[segment] @ modulated_weight(slot)ᵀ + bias, segment by segment.

    Args:
        x: ``[rows, in]``.
        w0: ``[out, in]``.
        slots: Factors by slot; a slot without an entry is the bare base in this layer.
        segments: Cover the rows of ``x``.
        bias: ``[out]`` or None; a slot's own bias goes before it.

    Returns:
        float64 ``[rows, out]``.
    """
    segments.check_covers(x.shape[0])
    y = torch.zeros(x.shape[0], w0.shape[0], dtype=torch.float64, device=x.device)
    for part in segments.parts:
        entry = slots.get(part.slot)
        weight, offset = w0.double(), bias
        if entry is not None:
            method, a, b, scale, own_bias = entry
            weight = modulated_weight(w0, method, a, b, scale)
            offset = bias if own_bias is None else own_bias
        rows = x[part.start : part.stop].double() @ weight.t()
        y[part.start : part.stop] = rows if offset is None else rows + offset.double()
    return y


def modulated_embedding(
    ids: torch.Tensor,
    w0: torch.Tensor,
    *,
    method: str,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Rows ``ids`` of the whole modulated table: float64 ``[*ids, dim]``.

    Args:
        ids: Integers, any shape.
        w0: ``[embeddings, dim]``.
        a: ``[r, embeddings]``.
        b: ``[dim, r]``.
    """
    return modulated_weight(w0.t(), method, a, b, scale).t()[ids]
