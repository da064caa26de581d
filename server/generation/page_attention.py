"""Attention of new rows to keys and values in pages: in torch operators, and by FlashAttention.

The one equation, for row i of a sequence whose table names its pages in order:

    out[i] = softmax(cap(q[i] · k[j] scale)) · v[j],  over j ≤ i and, with a window w, j > i - w

``varlen`` is torch's own kernel for CUDA (``torch.nn.attention.varlen``), always with one split of
the keys: that makes an answer the same in any batch. ``decode_in_torch`` is the same for one row a
sequence on any device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from server.base.plan import PAGE_TOKENS
from server.base.varlen import varlen_obstacle
from server.generation.attention import Call, Span
from server.generation.kv_cache import READ_PAGE, SLIDING_LAYERS, WRITE_PAGE, AttentionKind, KVCache
from server.options import EngineOptions

logger = logging.getLogger(__name__)

VARLEN_PAGE_TOKENS: Final = 256  # FlashAttention 2 takes multiples of it


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the keys and values of some sequences are, new ones written already.

    Args:
        keys, values: ``[pages, page tokens, key heads, dim]``.
        tables: int32 ``[sequences, P]``: the pages of each, in order.
        lengths: int32 ``[sequences]``: tokens of each, its new rows being the last of them.
        window: Tokens that a row sees, its own included; None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    window: int | None


class DecodeAttention(Protocol):
    """Attends one row of each sequence; fills ``call.out`` and looks at no number on the device."""

    def __call__(self, call: Call, pages: Pages) -> None: ...


def decode_in_torch(call: Call, pages: Pages) -> None:
    """One row a sequence, every table read to its end under a mask; fills ``call.out``."""
    rows, many = pages.tables.shape
    _, page, kv_heads, dim = pages.keys.shape
    flat = pages.tables.reshape(-1)
    k, v = (
        one.index_select(0, flat).view(rows, many * page, kv_heads, one.shape[-1]).transpose(1, 2)
        for one in (pages.keys, pages.values)
    )
    place = torch.arange(many * page, device=flat.device)
    lengths = pages.lengths[:, None]
    hidden = place >= lengths
    if pages.window is not None:
        hidden = hidden | (place < lengths - pages.window)
    mask = torch.zeros(hidden.shape, dtype=k.dtype, device=k.device)
    mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]
    attended = call.attend(call.query.view(rows, kv_heads, -1, dim), k, v, mask, causal=False)
    call.out.copy_(attended.reshape(rows, -1, attended.shape[-1]))


def varlen(call: Call, pages: Pages, starts: torch.Tensor, most_rows: int) -> None:
    """Any number of rows for each sequence, by torch's FlashAttention; fills ``call.out``.

    Args:
        call: Rows of all sequences, side by side.
        pages: Of each sequence.
        starts: int32 ``[sequences + 1]``, the first row of each, then how many there are.
        most_rows: Of a sequence.
    """
    from torch.nn.attention.varlen import varlen_attn_out

    varlen_attn_out(
        call.out,
        call.query,
        pages.keys,
        pages.values,
        starts,
        None,
        most_rows,
        pages.tables.shape[1] * pages.keys.shape[1],
        scale=call.scale,
        window_size=(-1 if pages.window is None else pages.window - 1, 0),
        enable_gqa=call.query.shape[1] != pages.keys.shape[2],
        seqused_k=pages.lengths,
        block_table=pages.tables,
        # The automatic choice makes an answer depend on its batch, and gave NaN in some steps.
        num_splits=1,
    )


def decode_by_varlen(call: Call, pages: Pages) -> None:
    """As ``decode_in_torch``, by ``varlen``."""
    device = pages.tables.device
    starts = torch.arange(len(pages.tables) + 1, dtype=torch.int32, device=device)
    varlen(call, pages, starts, most_rows=1)


class VarlenBatch:
    """Where one flattened batch is written and read, any number of rows for each sequence.

    Args:
        cache: Holds the pages that were reserved for each sequence.
        spans: The sequences in the order of their rows, covering all rows.
        attend: ``varlen``, or what computes the same.
    """

    def __init__(
        self,
        cache: KVCache,
        spans: Sequence[Span],
        attend: Callable[[Call, Pages, torch.Tensor, int], None] = varlen,
    ) -> None:
        self.cache = cache
        self.layers_run = 0
        self._attend = attend
        device, page = cache.device, cache.block_tokens
        self._starts = _on_device([*(span.start for span in spans), spans[-1].stop], device)
        self._lengths = _on_device([span.tokens for span in spans], device)
        self._most_rows = max(span.rows for span in spans)
        self._tables: dict[AttentionKind, torch.Tensor] = {}
        self._write: dict[AttentionKind, torch.Tensor] = {}
        self._fresh: dict[AttentionKind, torch.Tensor] = {}
        for kind in dict.fromkeys(cache.layer_kinds):
            tables = [cache.table(span.key, kind, span.tokens) for span in spans]
            widest = max(map(len, tables))
            rows = [[*table, *[READ_PAGE] * (widest - len(table))] for table in tables]
            self._tables[kind] = _on_device(rows, device)
            self._write[kind] = torch.tensor(
                [
                    table[t // page] * page + t % page
                    for span, table in zip(spans, tables, strict=True)
                    for t in range(span.past, span.tokens)
                ],
                device=device,
            )
            fresh = [
                one
                for span, table in zip(spans, tables, strict=True)
                for one in table[-(-span.past // page) :]
            ]
            self._fresh[kind] = torch.tensor(fresh or [WRITE_PAGE], device=device)

    def attend(self, layer: int, call: Call) -> None:
        """Write the new keys and values of a layer, and fill ``call.out``."""
        kind = self.cache.layer_kinds[layer]
        keys, values = self.cache.pages_of(layer)
        for pages, new in ((keys, call.key), (values, call.value)):
            pages.index_fill_(0, self._fresh[kind], 0)
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self._write[kind], new)
        window = self.cache.window if kind == SLIDING_LAYERS else None
        held = Pages(keys, values, self._tables[kind], self._lengths, window)
        self._attend(call, held, self._starts, self._most_rows)
        self.layers_run += 1


def _on_device(numbers: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def page_tokens_of(text: Any, model: Any, options: EngineOptions) -> int:
    """Tokens of a page: as many as torch's kernel for static steps takes, where it can be used."""
    if options.decode_steps == "dynamic" or model.device.type != "cuda":
        return PAGE_TOKENS
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    reason = varlen_obstacle(int(width), model.dtype, model.device, capped=capped)
    if reason is None:
        return VARLEN_PAGE_TOKENS
    logger.warning("Torch operators attend in decode steps, not FlashAttention: %s", reason)
    return PAGE_TOKENS
