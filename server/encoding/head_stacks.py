"""Heads of one shape run as one: their numbers stacked, one batched product for all adapters.

    logits[g, i] = head(params[g], rows[g, i])

The family's own code computes it, once for all heads, by ``torch.func.vmap``. What that cannot do
(a head that looks at a number) raises, and the caller runs such heads one by one. Where nobody has
measured which is faster, both ways are compared and timed on the traffic itself.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from server.encoding.heads import TaskHead
from server.encoding.way_times import HEAD_WAYS, WayTimes

# Of all heads that run as one: their numbers are copied side by side.
MOST_STACKED_BYTES: Final = 256 << 20
# Of a logit, relative to the largest of its head: what sums in another order may cost.
_LOGITS_TOLERANCE = 1e-3


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
    own = [head.tensors for head in heads]
    stacked = {name: torch.stack([one[name] for one in own]) for name in own[0]}
    pooled = None if batch.pooled is None else batch.pooled[index]
    found = torch.vmap(heads[0].with_tensors, in_dims=(0, 0, None if pooled is None else 0, 0, 0))(
        stacked, batch.hidden[index], pooled, batch.ids[index], batch.mask[index]
    )
    return [found[number, : len(rows)] for number, rows in enumerate(batch.rows)]


def logits_apart(heads: Sequence[TaskHead], batch: HeadRows) -> list[torch.Tensor]:
    """As ``logits_together``, one head after the other."""
    found: list[torch.Tensor] = []
    for head, own in zip(heads, batch.rows, strict=True):
        rows = list(own)
        pooled = None if batch.pooled is None else batch.pooled[rows]
        found.append(head(batch.hidden[rows], pooled, batch.ids[rows], batch.mask[rows]))
    return found


class TimedStacks:
    """Heads that are alike by the way that is the faster for so many of them.

    The first batch of a kind of heads runs both ways, which must agree; the next ones are timed,
    each way in turn. One thread uses it.

    Args:
        device: Where the heads are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._same: set[Hashable] = set()  # kinds that gave the same together
        self._times = WayTimes(HEAD_WAYS)

    def logits(self, heads: Sequence[TaskHead], batch: HeadRows) -> list[torch.Tensor]:
        """As ``logits_together``, by either way.

        Raises:
            RuntimeError: Such heads cannot run together, or give something else then.
        """
        key = heads[0].alike
        if sum(head.nbytes for head in heads) > MOST_STACKED_BYTES:
            return logits_apart(heads, batch)
        if key not in self._same:
            apart, together = logits_apart(heads, batch), logits_together(heads, batch)
            if not all(map(_same_logits, together, apart)):
                raise RuntimeError("their logits are others when they run as one")
            self._same.add(key)
            return apart
        bucket = (key, len(heads).bit_length())
        way, is_due = self._times.way(bucket), self._times.is_due(bucket)
        run = logits_apart if way == "apart" else logits_together
        if not is_due:
            return run(heads, batch)
        self._wait()
        began = time.perf_counter()
        logits = run(heads, batch)
        self._wait()
        self._times.note(bucket, way, (time.perf_counter() - began) / len(heads))
        return logits

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _same_logits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits are the same but for the order of sums; those that are not finite, too."""
    finite = wanted[torch.isfinite(wanted)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    most = _LOGITS_TOLERANCE * max(largest, 1e-12)
    return torch.allclose(found, wanted, rtol=0.0, atol=most, equal_nan=True)
