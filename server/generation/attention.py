"""Attention over a paged KV cache, each sequence over its own keys only.

transformers' own attention for continuous batching (``sdpa``) treats the flattened batch as one
sequence under a block-diagonal mask, so its work grows with the square of the number of sequences.
Here the decoding sequences are gathered page by page into small padded groups and each chunk of a
prompt attends alone. Registered in transformers' ``AttentionInterface`` under ``PAGED_ATTENTION``;
it reads where everything is from the ``PagedBatch`` that travels through the model's keywords.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
)

PAGED_ATTENTION = "hira_paged"
# Keys (or values) of one group of decoding sequences: within a core's cache on a CPU, one kernel
# for a usual batch on a GPU.
GROUP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``start`` to ``start + rows`` of the batch: sequence ``key`` from token ``past`` on."""

    key: str
    start: int
    rows: int
    past: int

    @property
    def stop(self) -> int:
        return self.start + self.rows

    @property
    def tokens(self) -> int:
        return self.past + self.rows


@dataclass(frozen=True, slots=True)
class _DecodingGroup:
    """Decoding sequences that attend together."""

    rows: torch.Tensor  # [g] row of each in the batch
    pages: torch.Tensor  # [g * p] pages of each, padded with the empty page 0
    mask: torch.Tensor | None  # [g, 1, 1, p * page] 0 or -inf; None when no page is partly filled


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece of one prompt, or one sequence of a sliding-window layer."""

    span: Span
    keys: slice | torch.Tensor | None  # rows of the gathered keys, or pages; None: the new keys
    mask: torch.Tensor | None  # [rows, keys]; None: causal from the first key on


class PagedBatch:
    """Where the keys and values of one flattened batch are written and read.

    Args:
        cache: Holds the pages that were reserved for each sequence.
        spans: The sequences in the order of their rows, covering all rows.
    """

    def __init__(self, cache: PagedAttentionCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.layers_run = 0
        like = torch.empty(0, dtype=cache.dtype, device=cache.device)
        full = cache.cache_allocators.get(FULL_ATTENTION)
        self.full = _FullPlan(full, spans, like) if full is not None else None
        sliding = cache.cache_allocators.get(SLIDING_ATTENTION)
        self.sliding = _SlidingPlan(sliding, spans, like) if sliding is not None else None


class _FullPlan:
    def __init__(self, allocator: Any, spans: Sequence[Span], like: torch.Tensor) -> None:
        device = like.device
        page: int = allocator.tokens_per_page
        stride: int = allocator.block_physical_stride // page
        self.page_tokens = page
        write: list[int] = []
        fresh: list[int] = []
        decoding: list[tuple[int, Span, list[int]]] = []
        self.chunks: list[_Chunk] = []
        for span in spans:
            used = -(-span.tokens // page)
            pages = [block * stride for block in allocator.block_table[span.key][:used]]
            write += [pages[t // page] * page + t % page for t in range(span.past, span.tokens)]
            fresh += pages[-(-span.past // page) :]
            if span.rows == 1 and span.past > 0:
                decoding.append((used, span, pages))
            elif span.past == 0:
                self.chunks.append(_Chunk(span, None, None))
            else:
                table = torch.tensor(pages, device=device)
                mask = _causal_mask(span.rows, span.tokens, span.past, like)
                self.chunks.append(_Chunk(span, table, mask))
        self.write = torch.tensor(write, device=device)
        # A page may still hold what its last owner left. A masked value counts 0 times, but 0 times
        # NaN is NaN: one broken adapter could spoil a later sequence. So a page starts as zeros.
        self.fresh = torch.tensor(fresh, dtype=torch.long, device=device) if fresh else None
        decoding.sort(key=lambda item: item[0])
        page_bytes = allocator.bytes_per_page // 2
        room = max(1, GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"]) // page_bytes)
        self.groups: list[_DecodingGroup] = []
        while decoding:
            widest = next(
                (n for n in range(len(decoding), 1, -1) if n * decoding[n - 1][0] <= room), 1
            )
            self.groups.append(_group(decoding[:widest], page, like))
            decoding = decoding[widest:]
        self._scratch: tuple[torch.Tensor, torch.Tensor] | None = None

    def gather(
        self, k_pages: torch.Tensor, v_pages: torch.Tensor, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the pages, [n, page, heads, dim], in memory used again and again."""
        if self._scratch is None:
            most = max(
                [len(group.pages) for group in self.groups]
                + [len(c.keys) for c in self.chunks if isinstance(c.keys, torch.Tensor)]
            )
            shape = (most, *k_pages.shape[1:])
            self._scratch = (k_pages.new_empty(shape), k_pages.new_empty(shape))
        k, v = (buffer[: len(pages)] for buffer in self._scratch)
        torch.index_select(k_pages, 0, pages, out=k)
        torch.index_select(v_pages, 0, pages, out=v)
        return k, v

    def attend(self, allocator: Any, layer: int, call: _Call) -> None:
        k_pages, v_pages = allocator.get_cache_for_block_table(layer)
        for pages, new in ((k_pages, call.key), (v_pages, call.value)):
            if self.fresh is not None:
                pages.index_fill_(0, self.fresh, 0)
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self.write, new)
        kv_heads, dim = k_pages.shape[2:]
        for group in self.groups:
            n = len(group.rows)
            k, v = self.gather(k_pages, v_pages, group.pages)
            k, v = (x.view(n, -1, kv_heads, x.shape[-1]).transpose(1, 2) for x in (k, v))
            # Query heads that share a key head become rows of one query.
            q = call.query.index_select(0, group.rows).view(n, kv_heads, -1, dim)
            attended = call.attend(q, k, v, group.mask, causal=False)
            call.out[group.rows] = attended.reshape(n, -1, attended.shape[-1])
        for chunk in self.chunks:
            if isinstance(chunk.keys, torch.Tensor):
                k, v = self.gather(k_pages, v_pages, chunk.keys)
                k, v = (x.view(-1, *x.shape[2:])[: chunk.span.tokens] for x in (k, v))
                call.attend_chunk(chunk.span, k, v, chunk.mask)
            else:
                own = slice(chunk.span.start, chunk.span.stop)
                call.attend_chunk(chunk.span, call.key[own], call.value[own], None)


class _SlidingPlan:
    """Sliding-window layers keep a ring of pages; transformers' allocator reads and writes it."""

    def __init__(self, allocator: Any, spans: Sequence[Span], like: torch.Tensor) -> None:
        device = like.device
        window: int = allocator.sliding_window
        read: list[int] = []
        write: list[int] = []
        self.chunks: list[_Chunk] = []
        start = 0
        for span in spans:
            read += allocator.get_read_indices(span.key, span.past, span.rows)
            write += allocator.get_write_indices(span.key, span.past, span.rows)
            keys = allocator.get_seqlen_k(span.past, span.rows)
            mask = _causal_mask(span.rows, keys, keys - span.rows, like, window)
            self.chunks.append(_Chunk(span, slice(start, start + keys), mask))
            start += keys
        self.read = torch.tensor(read, device=device)
        self.write = torch.tensor(write, device=device)

    def attend(self, allocator: Any, layer: int, call: _Call) -> None:
        k, v = allocator.update(call.key, call.value, layer, self.read, self.write)
        for chunk in self.chunks:
            assert isinstance(chunk.keys, slice)
            call.attend_chunk(chunk.span, k[chunk.keys], v[chunk.keys], chunk.mask)


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer's attention: rows first, [N, heads, dim]; ``out`` is filled row by row."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    scale: float | None
    softcap: float | None

    def attend_chunk(
        self, span: Span, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        q = self.query[span.start : span.stop].transpose(0, 1)[None]
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.transpose(0, 1)[None].repeat_interleave(repeats, dim=1) for x in (k, v))
        attended = self.attend(q, k, v, mask, causal=mask is None)
        self.out[span.start : span.stop] = attended[0].transpose(0, 1)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        causal: bool,
    ) -> torch.Tensor:
        """softmax(cap(q kᵀ scale) + mask) v for [batch, heads, rows, dim]."""
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale
            )
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.tanh(q @ k.transpose(-1, -2) * scale / self.softcap) * self.softcap
        if causal:
            mask = _causal_mask(q.shape[-2], k.shape[-2], 0, q)
        if mask is not None:
            scores = scores + mask
        return scores.float().softmax(-1).to(v.dtype) @ v


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedBatch,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend each row of a flattened batch to the keys of its own sequence.

    Args:
        query: [1, heads, N, dim]; key, value: [1, kv_heads, N, dim], of the N new tokens.
        attention_mask: None: causality and padding follow from ``paged``.
        paged: Where the sequences are; the new keys and values are written to its cache.

    Returns:
        [1, N, heads, dim], and None for the weights.

    Raises:
        ValueError: the model asks for attention sinks or a position bias, which are not supported.
    """
    for name in ("s_aux", "sinks", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"Paged attention does not support {name!r}, which this base uses.")
    cache = paged.cache
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    allocator = cache.layer_to_allocator[layer]
    plan = paged.full if allocator.layer_type == FULL_ATTENTION else paged.sliding
    assert plan is not None
    assert attention_mask is None
    rows = query[0].transpose(0, 1)
    new_key, new_value = (x[0].transpose(0, 1).to(cache.dtype) for x in (key, value))
    out = query.new_empty(rows.shape[0], rows.shape[1], value.shape[-1])
    plan.attend(allocator, layer, _Call(rows, new_key, new_value, out, scaling, softcap))
    paged.layers_run += 1
    return out[None], None


def _group(
    members: Sequence[tuple[int, Span, list[int]]],
    page: int,
    like: torch.Tensor,
) -> _DecodingGroup:
    width = members[-1][0]
    table = [p for used, _, pages in members for p in pages + [0] * (width - used)]
    lengths = [span.tokens for _, span, _ in members]
    mask = None
    if min(lengths) < width * page:
        absent = torch.arange(width * page) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(absent.shape, dtype=like.dtype).masked_fill_(absent, float("-inf"))
        mask = mask[:, None, None].to(like.device)
    rows = torch.tensor([span.start for _, span, _ in members], device=like.device)
    return _DecodingGroup(rows, torch.tensor(table, device=like.device), mask)


def _causal_mask(
    rows: int, keys: int, past: int, like: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """0 where row i may see key j (j <= past + i, and within the window), else -inf."""
    position = torch.arange(past, past + rows, device=like.device)[:, None]
    key = torch.arange(keys, device=like.device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    mask = like.new_zeros(hidden.shape)
    return mask.masked_fill_(hidden, float("-inf"))


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
