"""Pages have one owner, or several that agree; nothing leaks, and rings hold what a window sees."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from server.generation.kv_cache import FULL_LAYERS, SLIDING_LAYERS, KVCache
from server.generation.pages import PagePool

PAGE = 4


def cache(blocks: int, *, sharing: bool = False, window: int | None = None) -> KVCache:
    config: Any = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    if window is not None:
        config.sliding_window = window
        config.layer_types = ["sliding_attention", "full_attention"]
    block = 2 * 2 * PAGE * 32 * 4
    return KVCache(
        config,
        budget_bytes=(blocks + 2) * block,
        max_sequences=8,
        context_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        share_prefixes=sharing,
        step_tokens=8,
        page_tokens=PAGE,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.booleans())
def test_no_page_is_lost_or_given_twice(seed: int, sharing: bool) -> None:
    chance = random.Random(seed)
    kv = cache(20, sharing=sharing)
    texts: dict[str, tuple[str, list[int], int]] = {}
    for turn in range(60):
        if texts and chance.random() < 0.4:
            key = chance.choice(list(texts))
            kv.release(key, forget=chance.random() < 0.3)
            del texts[key]
            continue
        version = chance.choice("ab")
        prompt = [chance.randrange(2) for _ in range(chance.randint(1, 30))]
        tokens = len(prompt) + chance.randint(1, 8)
        key = f"s{turn}"
        found = kv.reserve(key, version, prompt, tokens)
        if found is None:
            assert kv.blocks_free < kv.blocks_for(tokens)
            continue
        assert found % PAGE == 0
        assert found < len(prompt)
        texts[key] = (version, prompt, tokens)
        kv.written(key, len(prompt) - found, ())
        held: dict[int, tuple[str, tuple[int, ...]]] = {}
        for other, (its_version, its_prompt, its_tokens) in texts.items():
            for place, page in enumerate(kv.table(other, FULL_LAYERS, its_tokens)):
                assert page >= 2
                what = (its_version, tuple(its_prompt[: (place + 1) * PAGE]))
                if page in held:  # shared: the same beginning of the same version, and a full page
                    assert sharing
                    assert held[page] == what
                    assert len(what[1]) == (place + 1) * PAGE
                held[page] = what
        assert kv.blocks_used == len(held)
    for key in texts:
        kv.release(key)
    assert kv.blocks_used == 0


def test_a_known_prefix_is_found_by_its_version_alone() -> None:
    kv = cache(20, sharing=True)
    prompt = list(range(10))
    assert kv.reserve("one", "a", prompt, 12) == 0
    kv.written("one", 10, ())
    assert kv.reserve("two", "a", [*prompt[:9], 7], 12) == 8
    assert kv.reserve("three", "b", prompt, 12) == 0
    assert kv.reserve("four", "a", [9, *prompt[1:]], 12) == 0
    assert kv.reserve("five", "a", prompt[:8], 12) == 4  # a token is left to read
    kv.release("one")
    kv.release("two")
    assert kv.reserve("six", "a", prompt, 12) == 8


def test_kept_pages_give_way_the_oldest_first() -> None:
    pool = PagePool(2, 4)
    old, young = pool.take(2), pool.take(2)
    assert old is not None
    assert young is not None
    pool.name(old[0], "root", (1,))
    pool.name(young[0], "root", (2,))
    pool.release(old)
    pool.release(young)
    assert (pool.kept, pool.available) == (2, 4)
    assert pool.take(5) is None
    assert pool.take(3) is not None
    assert pool.find("root", (1,)) is None
    assert pool.find("root", (2,)) is not None


@pytest.mark.parametrize("window", [1, 4, 7, 20])
def test_a_ring_holds_what_a_window_and_a_step_need(window: int) -> None:
    kv = cache(40, window=window)
    assert kv.reserve("x", None, [0], 64) == 0
    table = kv.table("x", SLIDING_LAYERS, 64)
    for stop in range(1, 65):
        for rows in range(1, min(8, stop) + 1):
            first = max(0, stop - rows - window + 1)
            needed = table[first // PAGE : -(-stop // PAGE)]
            assert len(set(needed)) == len(needed), (window, stop, rows)
    assert len(set(table)) < len(kv.table("x", FULL_LAYERS, 64)) or window > 40
