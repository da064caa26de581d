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
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from server.generation.kv_cache import READ_PAGE, SLIDING_LAYERS, AttentionKind, KVCache

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
class _Decoding:
    """One decoding sequence: the pages that it sees something of, and its tokens in them."""

    span: Span
    pages: list[int]
    first: int  # the first token that it sees, counted from its first page
    tokens: int  # up to its own, counted likewise


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece of one prompt."""

    span: Span
    pages: torch.Tensor | None  # None: the new keys are all there are
    tokens: int  # in the pages
    mask: torch.Tensor | None  # [rows, keys]; None: causal from the first key on


class PagedKeys(Protocol):
    """What a model's attention layers are given: who attends to what, in pages."""

    cache: KVCache
    layers_run: int

    def attend(self, layer: int, call: Call) -> None:
        """Write the new keys and values of a layer, and fill ``call.out``."""


def check_all_attended(keys: PagedKeys, model: Any) -> None:
    """Raise where a forward has left out layers.

    Args:
        keys: What its layers were given.
        model: transformers' model that ran.

    Raises:
        RuntimeError: Some layers do not attend through transformers' attention interface.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if keys.layers_run != layers:
        raise RuntimeError(
            f"{type(model).__name__} ran {keys.layers_run} of {layers} layers through "
            "transformers' attention interface, so it cannot generate here."
        )


class PagedBatch:
    """Where the keys and values of one flattened batch are written and read.

    Args:
        cache: Holds the pages that were reserved for each sequence.
        spans: The sequences in the order of their rows, covering all rows.
        alone: Each decoding sequence attends by itself: the shapes that it is computed in are its
            own, whoever else is there.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], *, alone: bool = False) -> None:
        self.cache = cache
        self.layers_run = 0
        self._plans = {
            kind: _KindPlan(cache, kind, spans, alone) for kind in dict.fromkeys(cache.layer_kinds)
        }

    def attend(self, layer: int, call: Call) -> None:
        """Write the new keys and values of a layer, and fill ``call.out``."""
        self._plans[self.cache.layer_kinds[layer]].attend(*self.cache.pages_of(layer), call)
        self.layers_run += 1


class _KindPlan:
    """All layers of one kind: where rows are written, and who attends to what."""

    def __init__(
        self, cache: KVCache, kind: AttentionKind, spans: Sequence[Span], alone: bool
    ) -> None:
        device = cache.device
        like = torch.empty(0, dtype=cache.dtype, device=device)
        page = cache.block_tokens
        window = cache.window if kind == SLIDING_LAYERS else None
        write: list[int] = []
        fresh: list[int] = []
        decoding: list[_Decoding] = []
        self.chunks: list[_Chunk] = []
        for span in spans:
            pages = cache.table(span.key, kind, span.tokens)
            write += [pages[t // page] * page + t % page for t in range(span.past, span.tokens)]
            fresh += pages[-(-span.past // page) :]
            first = 0 if window is None else max(0, span.past + 1 - window) // page
            if span.rows == 1 and span.past > 0:
                least = 0 if window is None else max(0, span.tokens - window)
                decoding.append(
                    _Decoding(span, pages[first:], least - first * page, span.tokens - first * page)
                )
            elif span.past == 0:
                narrow = window is not None and span.rows > window
                mask = _causal_mask(span.rows, span.rows, 0, like, window) if narrow else None
                self.chunks.append(_Chunk(span, None, 0, mask))
            else:
                past, tokens = span.past - first * page, span.tokens - first * page
                mask = _causal_mask(span.rows, tokens, past, like, window)
                table = torch.tensor(pages[first:], device=device)
                self.chunks.append(_Chunk(span, table, tokens, mask))
        self.write = torch.tensor(write, device=device)
        # A page may still hold what its last owner left. A masked value counts 0 times, but 0 times
        # NaN is NaN: one broken adapter could spoil a later sequence. So a page starts as zeros.
        self.fresh = torch.tensor(fresh, dtype=torch.long, device=device) if fresh else None
        decoding.sort(key=lambda one: len(one.pages))
        page_bytes = cache.block_bytes // len(cache.layer_kinds) // 2
        room = max(1, GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"]) // page_bytes)
        self.groups: list[_DecodingGroup] = []
        while decoding:
            widest = next(
                (
                    n
                    for n in range(1 if alone else len(decoding), 1, -1)
                    if n * len(decoding[n - 1].pages) <= room
                ),
                1,
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
                + [len(c.pages) for c in self.chunks if c.pages is not None]
            )
            shape = (most, *k_pages.shape[1:])
            self._scratch = (k_pages.new_empty(shape), k_pages.new_empty(shape))
        k, v = (buffer[: len(pages)] for buffer in self._scratch)
        torch.index_select(k_pages, 0, pages, out=k)
        torch.index_select(v_pages, 0, pages, out=v)
        return k, v

    def attend(self, k_pages: torch.Tensor, v_pages: torch.Tensor, call: Call) -> None:
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
            if chunk.pages is not None:
                k, v = self.gather(k_pages, v_pages, chunk.pages)
                k, v = (x.view(-1, *x.shape[2:])[: chunk.tokens] for x in (k, v))
                call.attend_chunk(chunk.span, k, v, chunk.mask)
            else:
                own = slice(chunk.span.start, chunk.span.stop)
                call.attend_chunk(chunk.span, call.key[own], call.value[own], chunk.mask)


@dataclass(frozen=True, slots=True)
class Call:
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
    paged: PagedKeys,
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
    assert attention_mask is None
    rows = query[0].transpose(0, 1)
    new_key, new_value = (x[0].transpose(0, 1).to(cache.dtype) for x in (key, value))
    out = query.new_empty(rows.shape[0], rows.shape[1], value.shape[-1])
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.attend(layer, Call(rows, new_key, new_value, out, scaling, softcap))
    return out[None], None


def _group(members: Sequence[_Decoding], page: int, like: torch.Tensor) -> _DecodingGroup:
    width = len(members[-1].pages)
    table = [p for one in members for p in [*one.pages, *[READ_PAGE] * (width - len(one.pages))]]
    mask = None
    if any(one.first or one.tokens < width * page for one in members):
        place = torch.arange(width * page)
        hidden = place >= torch.tensor([one.tokens for one in members])[:, None]
        hidden |= place < torch.tensor([one.first for one in members])[:, None]
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None].to(like.device)
    rows = torch.tensor([one.span.start for one in members], device=like.device)
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
