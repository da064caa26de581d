"""Memory of the running sequences: keys and values in pages, within a budget of bytes.

All that a sequence may come to need is reserved before it starts, so a running sequence never fails
for want of room; prefixes of different adapter versions are kept apart. Layers of full attention
hold every token. Layers with a sliding window have a ring of pages for each sequence, as many as
its window and one step can need: in their tables a page comes again and again. What is computed
over the pages is left to ``server.generation.attention``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from server.base.plan import PAGE_TOKENS, TRASH_BLOCKS, kv_too_small
from server.generation.pages import PagePool

AttentionKind = Literal["full_attention", "sliding_attention"]
FULL_LAYERS: Final = "full_attention"
SLIDING_LAYERS: Final = "sliding_attention"
# Of the pages that no sequence is given: one is read where a table has no page and stays zeros,
# one is written by rows that stand for nobody.
READ_PAGE: Final = 0
WRITE_PAGE: Final = 1


@dataclass(slots=True)
class _Held:
    """What one sequence has."""

    root: Hashable
    prompt: tuple[int, ...]
    private: bool
    full: list[int]
    ring: list[int]
    written: int  # tokens
    named: int  # pages of ``full`` whose prefix is named
    before: Hashable  # of the next page to be named
    generated: list[int] = field(default_factory=list)


class KVCache:
    """Pages of keys and values for all layers of one model.

    Args:
        config: The text config of the base; says how many layers, heads and which attention.
        budget_bytes: What the cache may take, its two spare blocks included.
        max_sequences, context_tokens: No more is taken than these could ever use.
        dtype, device: Of the keys and values.
        share_prefixes: Let sequences of one adapter version share the pages of a common prefix;
            where all layers have full attention.
        step_tokens: The most tokens of one sequence in one step.
        page_tokens: Of a page.

    Raises:
        BaseModelError: the budget does not hold a single block.
        ValueError: A layer has another kind of attention.
    """

    def __init__(
        self,
        config: Any,
        *,
        budget_bytes: int,
        max_sequences: int,
        context_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        share_prefixes: bool = False,
        step_tokens: int = 1024,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        self.block_tokens = page_tokens
        self.dtype = dtype
        self.device = device
        self.step_tokens = step_tokens
        self.context_tokens = context_tokens
        kinds = _kinds(config)
        self.layer_kinds: tuple[AttentionKind, ...] = tuple(kinds)
        self.window: int | None = None
        if SLIDING_LAYERS in kinds:
            self.window = _window(config)
        shape = (page_tokens, _key_heads(config), _head_dim(config))
        page_bytes = 2 * shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.block_bytes = len(kinds) * page_bytes
        longest = -(-context_tokens // page_tokens)
        # What a step writes must not lie on what its first row still sees.
        self._ring_pages = 0
        if self.window is not None:
            needed = self.window + min(step_tokens, context_tokens) + page_tokens
            self._ring_pages = min(longest, -(-needed // page_tokens))
        blocks = min(budget_bytes // self.block_bytes - TRASH_BLOCKS, max_sequences * longest)
        if blocks < 1:
            raise kv_too_small(budget_bytes, (TRASH_BLOCKS + 1) * self.block_bytes)
        pages: dict[AttentionKind, int] = {
            kind: blocks for kind in (FULL_LAYERS, SLIDING_LAYERS) if kind in kinds
        }
        if len(pages) == 2:
            # Rings are short: what they leave of the budget goes to the other layers.
            pages[SLIDING_LAYERS] = min(blocks, max_sequences * self._ring_pages)
            rest = (
                budget_bytes
                - (pages[SLIDING_LAYERS] + TRASH_BLOCKS) * kinds.count(SLIDING_LAYERS) * page_bytes
            )
            own = rest // (kinds.count(FULL_LAYERS) * page_bytes) - TRASH_BLOCKS
            pages[FULL_LAYERS] = max(blocks, min(own, max_sequences * longest))
        elif SLIDING_LAYERS in pages:
            pages[SLIDING_LAYERS] = min(blocks, max_sequences * self._ring_pages)
        self._pools = {kind: PagePool(TRASH_BLOCKS, many) for kind, many in pages.items()}
        self._pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        for kind in kinds:
            size = (pages[kind] + TRASH_BLOCKS, *shape)
            self._pages.append(
                (
                    torch.zeros(size, dtype=dtype, device=device),
                    torch.zeros(size, dtype=dtype, device=device),
                )
            )
        self.shares_prefixes = share_prefixes and SLIDING_LAYERS not in kinds
        # Of whichever kind of layers has more to hold.
        self._main: AttentionKind = FULL_LAYERS if FULL_LAYERS in pages else SLIDING_LAYERS
        self.blocks_total = pages[self._main]
        rings = SLIDING_LAYERS in pages and pages[SLIDING_LAYERS] < self._ring_pages
        held = [pages[kind] for kind in pages if kind == FULL_LAYERS or rings]
        self.capacity_tokens = min([*held, longest]) * page_tokens
        self._held: dict[str, _Held] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(k.nbytes + v.nbytes for k, v in self._pages)

    @property
    def blocks_cached(self) -> int:
        """Blocks that no sequence uses, kept for the prefix that they hold."""
        return self._pools[self._main].kept

    @property
    def blocks_free(self) -> int:
        """Blocks that a new sequence could have, the cached ones included."""
        return self._pools[self._main].available

    @property
    def blocks_used(self) -> int:
        return self.blocks_total - self.blocks_free

    @property
    def table_pages(self) -> int:
        """The most pages in the table of a sequence."""
        return -(-self.context_tokens // self.block_tokens)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens take in full-attention layers."""
        return -(-tokens // self.block_tokens)

    def pages_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each ``[pages, page tokens, heads, head width]``."""
        return self._pages[layer]

    def table(self, key: str, kind: AttentionKind, tokens: int) -> list[int]:
        """The pages of the first ``tokens`` tokens of ``key``, in order, in layers of a kind.

        In a ring those before its last lap are under later ones: only what a window sees is there.
        """
        held = self._held[key]
        pages = self.blocks_for(tokens)
        if kind == FULL_LAYERS:
            return held.full[:pages]
        return [held.ring[place % len(held.ring)] for place in range(pages)]

    def reserve(
        self,
        key: str,
        version: Hashable,
        prompt: Sequence[int],
        tokens: int,
        *,
        reuse: bool = True,
        share: bool = True,
    ) -> int | None:
        """Reserve room for ``tokens`` tokens of sequence ``key``, its whole life.

        Args:
            key: Names the sequence until ``release``.
            version: Sequences share a prefix only within one version.
            prompt: Its tokens; only their prefix is looked up.
            tokens: Most tokens whose keys and values it will ever hold.
            reuse: Whether a prefix that is there already will do. Not for a prompt whose every
                token must be read, because what comes out of the model is asked for.
            share: Whether others may have its prefix. Not for one that will be written anew.

        Returns:
            How many tokens of the prompt are there already (fewer than all of them), or None when
            there is no room now; then nothing has changed.
        """
        root = self._root(version)
        found: list[int] = []
        before: Hashable = root
        if self.shares_prefixes and reuse and share:
            found, before = self._find(root, prompt)
        pages = self.blocks_for(tokens)
        for page in found:
            self._pools[FULL_LAYERS].hold(page)
        taken: dict[AttentionKind, list[int]] = {}
        for kind, pool in self._pools.items():
            wanted = pages - len(found) if kind == FULL_LAYERS else min(pages, self._ring_pages)
            got = pool.take(wanted)
            if got is None:
                for other, held in taken.items():
                    self._pools[other].release(held)
                if found:
                    self._pools[FULL_LAYERS].release(found)
                return None
            taken[kind] = got
        self._held[key] = _Held(
            root=root,
            prompt=tuple(prompt),
            private=not share or not self.shares_prefixes,
            full=[*found, *taken.get(FULL_LAYERS, [])],
            ring=taken.get(SLIDING_LAYERS, []),
            written=len(found) * self.block_tokens,
            named=len(found),
            before=before,
        )
        return len(found) * self.block_tokens

    def _find(self, root: Hashable, prompt: Sequence[int]) -> tuple[list[int], Hashable]:
        """The pages of the longest known prefix that leaves a token to read, and what follows."""
        size = self.block_tokens
        pages: list[int] = []
        before = root
        for start in range(0, (len(prompt) - 1) // size * size, size):
            found = self._pools[FULL_LAYERS].find(before, tuple(prompt[start : start + size]))
            if found is None:
                break
            pages.append(found[0])
            before = found[1]
        return pages, before

    def written(self, key: str, rows: int, generated: Sequence[int]) -> None:
        """Note that ``rows`` more tokens of ``key`` are in the cache; their blocks can be shared.

        ``generated`` are the tokens after the prompt that were known before this forward.
        """
        held = self._held[key]
        held.written += rows
        if held.private:
            return
        size = self.block_tokens
        while (held.named + 1) * size <= held.written:
            start, stop = held.named * size, (held.named + 1) * size
            prompt = held.prompt[start:stop]
            past = max(0, start - len(held.prompt))
            tokens = (*prompt, *generated[past : past + size - len(prompt)])
            held.before = self._pools[FULL_LAYERS].name(held.full[held.named], held.before, tokens)
            held.named += 1

    def rewind(self, key: str) -> None:
        """Forget what ``key`` has written, not its room: all of it will be written anew."""
        held = self._held[key]
        assert held.private
        held.written = 0

    def length(self, key: str) -> int:
        """Tokens of ``key`` whose keys and values are in the cache."""
        return self._held[key].written

    def release(self, key: str, *, forget: bool = False) -> None:
        """Free what ``key`` holds. With ``forget`` its prefix is not kept for others either."""
        held = self._held.pop(key, None)
        if held is None:
            return
        if held.full:
            self._pools[FULL_LAYERS].release(held.full, forget=forget)
        if held.ring:
            self._pools[SLIDING_LAYERS].release(held.ring, forget=forget)

    def _root(self, version: Hashable) -> Hashable:
        """What comes before the first page: chains of two versions have nothing in common."""
        return ("root", version)


def _kinds(config: Any) -> list[AttentionKind]:
    """The attention of each layer.

    Raises:
        ValueError: Another one.
    """
    named = getattr(config, "layer_types", None)
    if named is None:
        one: AttentionKind = (
            FULL_LAYERS if getattr(config, "sliding_window", None) is None else SLIDING_LAYERS
        )
        return [one] * int(config.num_hidden_layers)
    kinds: list[AttentionKind] = []
    for name in named:
        if name == FULL_LAYERS:
            kinds.append(FULL_LAYERS)
        elif name == SLIDING_LAYERS:
            kinds.append(SLIDING_LAYERS)
        else:
            raise ValueError(f"Invalid layer type: {name}")
    return kinds


def _window(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= 0:
        raise ValueError(f"Sliding window must be a positive integer, but got {window!r}")
    return window


def _key_heads(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None)
    heads = getattr(config, "num_attention_heads", None) if heads is None else heads
    if heads is None:
        raise ValueError("The config names neither num_key_value_heads nor num_attention_heads.")
    return int(heads)


def _head_dim(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    if width is None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = hidden // heads
    return int(width)
