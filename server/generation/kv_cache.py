"""Memory of the running sequences: keys and values in pages, within a budget of bytes.

A thin owner of transformers' ``PagedAttentionCache``: it sizes the cache from a budget instead of
from free memory, reserves all that a sequence may come to need before it starts (so that a running
sequence never fails for want of room), and keeps the prefixes of different adapter versions apart.
What is computed over the pages is left to ``server.generation.attention``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.model_runner import (
    infer_max_single_request_tokens,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import (
    find_head_dim,
    find_num_key_value_heads,
)

from server.base.plan import PAGE_TOKENS, TRASH_BLOCKS, kv_too_small

MAX_ROOTS = 1 << 16


class KVCache:
    """Pages of keys and values for all layers of one model.

    Args:
        config: The text config of the base; says how many layers, heads and which attention.
        budget_bytes: What the cache may take, its two spare blocks included.
        max_sequences, context_tokens: No more is taken than these could ever use.
        dtype, device: Of the keys and values.
        share_prefixes: Let sequences of one adapter version share the pages of a common prefix.

    Raises:
        BaseModelError: the budget does not hold a single block.
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
    ) -> None:
        self.block_tokens = PAGE_TOKENS
        self.block_bytes = (
            config.num_hidden_layers
            * FullAttentionCacheAllocator.get_bytes_per_page(
                find_num_key_value_heads(config), find_head_dim(config), dtype, PAGE_TOKENS
            )
        )
        blocks = min(
            budget_bytes // self.block_bytes - TRASH_BLOCKS,
            max_sequences * -(-context_tokens // PAGE_TOKENS),
        )
        if blocks < 1:
            raise kv_too_small(budget_bytes, (TRASH_BLOCKS + 1) * self.block_bytes)
        self.paged = PagedAttentionCache(
            config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=blocks,
                # Sizes static inputs and a mask that this lane never allocates.
                max_batch_tokens=1,
                max_requests_per_batch=1,
                max_blocks_per_request=0,
                allow_block_sharing=share_prefixes,
                use_async_batching=False,
                use_cuda_graph=False,
                max_memory_percent=1.0,
                auto_switch_to_flash=False,
            ),
            device=device,
            distributed_helper=DistributedHelper(
                device_mesh=None, cpu_group_timeout=None, tp_plan={}
            ),
            dtype=dtype,
            model_supports_logits_to_keep=True,
        )
        self.shares_prefixes: bool = self.paged.use_prefix_sharing
        self.blocks_total: int = self.paged.num_blocks
        self.capacity_tokens: int = infer_max_single_request_tokens(self.paged)
        self._states: dict[str, RequestState] = {}
        self._private: set[str] = set()  # whose blocks are never shared
        self._roots: dict[tuple[Hashable, int], int] = {}
        self._next_root = count()

    @property
    def blocks_cached(self) -> int:
        """Blocks that no sequence uses, kept for the prefix that they hold."""
        return sum(len(a.ledger.cached_blocks) for a in self.paged.cache_allocators.values())

    @property
    def blocks_free(self) -> int:
        """Blocks that a new sequence could have, the cached ones included."""
        free_bytes = self.paged.compute_free_capacity(relative=False)
        return int(free_bytes // self.block_bytes) + self.blocks_cached

    @property
    def blocks_used(self) -> int:
        return self.blocks_total - self.blocks_free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens take in full-attention layers."""
        return -(-tokens // self.block_tokens)

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
        state = RequestState(request_id=key, initial_tokens=self._rooted(version, prompt))
        shared = 0
        if reuse and share:
            shared = int(self.paged.search_prefix_match(key, state.initial_tokens))
        state.position_offset = shared
        if not self._store(state, tokens - shared):
            self.paged.free_blocks(key)
            return None
        self._states[key] = state
        if not share:
            self._private.add(key)
        return shared

    def _store(self, state: RequestState, tokens: int) -> bool:
        if self.paged.can_store_request_tokens(state, tokens):
            return True
        evicted = self.paged.evict_cached_blocks()
        self.paged.pool.try_to_free_sectors()
        several_kinds = len(self.paged.cache_allocators) > 1
        return (evicted or several_kinds) and bool(
            self.paged.can_store_request_tokens(state, tokens)
        )

    def written(self, key: str, rows: int, generated: Sequence[int]) -> None:
        """Note that ``rows`` more tokens of ``key`` are in the cache; their blocks can be shared.

        ``generated`` are the tokens after the prompt that were known before this forward.
        """
        state = self._states[key]
        complete = self.paged.count_new_complete_blocks(state, rows)
        state.position_offset += rows
        if complete and key not in self._private:
            state.generated_tokens = list(generated)
            self.paged.mark_complete_blocks(state, complete)

    def rewind(self, key: str) -> None:
        """Forget what ``key`` has written, not its room: all of it will be written anew."""
        assert key in self._private or not self.shares_prefixes
        self._states[key].position_offset = 0

    def length(self, key: str) -> int:
        """Tokens of ``key`` whose keys and values are in the cache."""
        return int(self._states[key].position_offset)

    def release(self, key: str, *, forget: bool = False) -> None:
        """Free what ``key`` holds. With ``forget`` its prefix is not kept for others either."""
        if self._states.pop(key, None) is not None:
            self.paged.free_blocks(key, no_cache=forget)
        self._private.discard(key)

    def _rooted(self, version: Hashable, prompt: Sequence[int]) -> list[int]:
        """The prompt as the ledger of shared prefixes sees it.

        The ledger chains hashes from the first block on and knows nothing of adapters. So in its
        eyes the first token is replaced by a number that stands for (version, first token): chains
        of different versions differ from their first block on, and with it in every later one.
        """
        if not self.shares_prefixes:
            return list(prompt)
        root = (version, prompt[0])
        if root not in self._roots:
            if len(self._roots) >= MAX_ROOTS:
                self._roots.clear()  # numbers are never used again: only chances to share are lost
            self._roots[root] = next(self._next_root)
        return [self._roots[root], *prompt[1:]]
