"""Heads of one shape run as one: their numbers stacked, one batched product for all adapters.

    logits[g, i] = head(params[g], rows[g, i])

The family's own code computes it, once for all heads, by ``torch.func.vmap``. What that cannot do
(a head that looks at a number) raises, and the caller runs such heads one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.encoding.heads import TaskHead


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Which rows of a batch each head reads.

    Args:
        hidden: ``[N, T, H]``.
        pooled: ``[N, H]``, where the base has a pooler.
        ids, mask: ``[N, T]``.
        rows: Of each head, at least one.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor
    mask: torch.Tensor
    rows: Sequence[Sequence[int]]


def logits_together(heads: Sequence[TaskHead], batch: HeadRows) -> list[torch.Tensor]:
    """The logits of each head's rows, as the heads would give them one by one.

    Args:
        heads: All ``alike``.
        batch: With rows for each of them.

    Returns:
        Of each head ``[n, ...]``, as ``TaskHead`` has it.

    Raises:
        RuntimeError: Such heads cannot run together.
    """
    most = max(map(len, batch.rows))
    # The last row again where a head has fewer than others.
    places = [[*rows, *[rows[-1]] * (most - len(rows))] for rows in batch.rows]
    index = torch.tensor(places).to(batch.hidden.device)
    own = [head.tensors() for head in heads]
    stacked = {name: torch.stack([one[name] for one in own]) for name in own[0]}
    pooled = None if batch.pooled is None else batch.pooled[index]
    found = torch.vmap(heads[0].with_tensors, in_dims=(0, 0, None if pooled is None else 0, 0, 0))(
        stacked, batch.hidden[index], pooled, batch.ids[index], batch.mask[index]
    )
    return [found[number, : len(rows)] for number, rows in enumerate(batch.rows)]


def no_head_stack(error: Exception) -> str:
    """Why heads do not run together, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
