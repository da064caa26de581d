"""The strategies in torch operators, for any device: each adds or writes rows of a given output.

All take W0 already dequantized, write where they are told to and keep no state. Which one serves
which rows is decided by ``adapters.modulation.modulator``.
"""

from __future__ import annotations

import torch


def linear_into(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """y = x Wᵀ + bias; writes ``y``.

    Args:
        y: ``[rows, out]``, contiguous rows of a larger output or all of it.
        x: ``[rows, in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def fold_into(out: torch.Tensor, w0: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = W0 + W0 ⊙ (B A); writes ``out``.

    1 + BA is never formed: in bfloat16 it would round away modulations below 2⁻⁸. The product BA
    and the fused multiply-add both accumulate in float32, so the folded weight is W0⊙(1+BA) to one
    rounding of its own type and one of BA.

    Args:
        out: ``[out, in]``, not overlapping ``w0``.
        w0: ``[out, in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
    """
    torch.mm(b, a, out=out)
    torch.addcmul(w0, w0, out, out=out)


def add_lora(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    """y += s (x Aᵀ) Bᵀ; adds to ``y`` ``[rows, out]``."""
    y.addmm_(torch.mm(x, a.t()), b.t(), alpha=scale)


def expand_into(z: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> None:
    """z[t, k] = a_k ⊙ x_t; writes ``z``.

    Args:
        z: ``[rows · r, in]``.
        x: ``[rows, in]``.
        a: ``[r, in]``.
    """
    torch.mul(x.unsqueeze(1), a, out=z.view(x.shape[0], a.shape[0], a.shape[1]))


def add_contracted(y: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> None:
    """y_t += Σ_k b_k ⊙ e[t, k], with e = z W0ᵀ; adds to ``y`` and overwrites ``e``.

    Args:
        y: ``[rows, out]``.
        e: ``[rows · r, out]``.
        b: ``[out, r]``.
    """
    terms = e.view(y.shape[0], b.shape[1], b.shape[0])
    torch.mul(terms, b.t(), out=terms)
    y.add_(terms.sum(dim=1))
