"""Attention over pages, against attention over each sequence in one piece."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from server.base.plan import PAGE_TOKENS, BaseModelError
from server.generation import attention as subject
from server.generation.attention import PagedBatch, Span, paged_attention
from server.generation.kv_cache import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 8


def config(layers: int = 2, **more: Any) -> Any:
    return LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=layers,
        vocab_size=32,
        **more,
    )


def cache(made: Any = None, **more: Any) -> KVCache:
    settings: dict[str, Any] = {
        "budget_bytes": 1 << 20,
        "max_sequences": 8,
        "context_tokens": 256,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return KVCache(made or config(), **(settings | more))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None, cap: float | None
) -> torch.Tensor:
    """Causal attention of one whole sequence in float64, head by head; [tokens, heads, dim]."""
    tokens = q.shape[0]
    out = torch.zeros(tokens, HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        for i in range(tokens):
            first = 0 if window is None else max(0, i - window + 1)
            keys = k[first : i + 1, shared].double()
            scores = keys @ q[i, head].double() / DIM**0.5
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            out[i, head] = scores.softmax(-1) @ v[first : i + 1, shared].double()
    return out


def run(
    kv: KVCache,
    data: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    steps: list[dict[str, int]],
    *,
    layer: int = 1,
    cap: float | None = None,
) -> dict[str, torch.Tensor]:
    """Feed the sequences in the steps given (key → rows); returns what each row attended to."""
    module: Any = SimpleNamespace(layer_idx=layer)
    outs: dict[str, list[torch.Tensor]] = {key: [] for key in data}
    for step in steps:
        spans, start = [], 0
        for key, rows in step.items():
            spans.append(Span(key, start, rows, kv.length(key)))
            start += rows
        batch = PagedBatch(kv, spans)
        q, k, v = (
            torch.cat([data[s.key][i][s.past : s.tokens] for s in spans]).transpose(0, 1)[None]
            for i in range(3)
        )
        out, _ = paged_attention(module, q, k, v, None, paged=batch, softcap=cap)
        for span in spans:
            outs[span.key].append(out[0, span.start : span.stop])
            kv.written(span.key, span.rows, ())
    return {key: torch.cat(parts) for key, parts in outs.items()}


def sequences(
    lengths: list[int], seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"s{i}": tuple(  # type: ignore[misc]
            torch.randn(n, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for i, n in enumerate(lengths)
    }


def random_steps(lengths: list[int], seed: int) -> list[dict[str, int]]:
    """Prompts in chunks, then single rows, all mixed."""
    generator = torch.Generator().manual_seed(seed)
    left = {f"s{i}": n for i, n in enumerate(lengths)}
    steps = []
    while any(left.values()):
        step = {}
        for key, n in left.items():
            most = int(torch.randint(0, 25, (), generator=generator))
            rows = min(n, most if torch.rand((), generator=generator) < 0.4 else 1)
            if rows:
                step[key] = rows
                left[key] -= rows
        if step:
            steps.append(step)
    return steps


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("group_bytes", [1, 4096, 1 << 21])
@pytest.mark.parametrize("seed", range(3))
def test_each_sequence_attends_to_itself_alone(
    seed: int, group_bytes: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(subject.GROUP_BYTES, "cpu", group_bytes)
    lengths = [1, 15, 16, 17, 40, 70]
    data = sequences(lengths, seed)
    kv = cache()
    for key, n in zip(data, lengths, strict=True):
        assert kv.reserve(key, None, [0] * n, n) == 0
    got = run(kv, data, random_steps(lengths, seed), cap=cap)
    for key, (q, k, v) in data.items():
        wanted = reference(q, k, v, window=None, cap=cap)
        torch.testing.assert_close(got[key].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sliding_window_layers_see_their_window(seed: int) -> None:
    made = Gemma3TextConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_hidden_layers=2,
        vocab_size=32,
        sliding_window=20,
        layer_types=["full_attention", "sliding_attention"],
    )
    made._attn_implementation = "sdpa"
    lengths = [1, 19, 21, 45, 70]
    data = sequences(lengths, seed)
    kv = cache(made)
    for key, n in zip(data, lengths, strict=True):
        assert kv.reserve(key, None, [0] * n, n) == 0
    got = run(kv, data, random_steps(lengths, seed), layer=1)
    for key, (q, k, v) in data.items():
        wanted = reference(q, k, v, window=20, cap=None)
        torch.testing.assert_close(got[key].double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_page_held_before_never_reaches_its_next_owner() -> None:
    kv = cache(budget_bytes=cache().block_bytes * 8)  # so few blocks that they are used again
    broken = {"bad": tuple(torch.full((90, h, DIM), float("nan")) for h in (4, 2, 2))}
    assert kv.reserve("bad", None, [0] * 90, 90) == 0
    run(kv, broken, [{"bad": 90}])  # type: ignore[arg-type]
    kv.release("bad")
    data = sequences([40, 41], 0)
    for key in data:
        assert kv.reserve(key, None, [0] * 41, 41) == 0
    steps = [{"s0": 20, "s1": 17}, *[{"s0": 1, "s1": 1}] * 20, {"s1": 4}]
    got = run(kv, data, steps)
    assert all(torch.isfinite(out).all() for out in got.values())


@pytest.mark.parametrize("unsupported", ["s_aux", "position_bias"])
def test_what_it_cannot_do_it_refuses(unsupported: str) -> None:
    kv = cache()
    kv.reserve("x", None, [0], 1)
    row = torch.zeros(1, HEADS, 1, DIM)
    key = torch.zeros(1, KV_HEADS, 1, DIM)
    module: Any = SimpleNamespace(layer_idx=0)
    batch = PagedBatch(kv, [Span("x", 0, 1, 0)])
    more: dict[str, Any] = {unsupported: row}
    with pytest.raises(ValueError, match=unsupported):
        paged_attention(module, row, key, key, None, paged=batch, **more)


def test_the_budget_bounds_the_memory() -> None:
    block = cache().block_bytes
    kv = cache(budget_bytes=10 * block + 5)
    assert kv.nbytes <= 10 * block + 5
    assert kv.blocks_total == 8
    assert kv.capacity_tokens == 8 * PAGE_TOKENS
    with pytest.raises(BaseModelError, match="too small"):
        cache(budget_bytes=2 * block)


def test_no_more_is_taken_than_can_be_used() -> None:
    assert cache(budget_bytes=1 << 30, max_sequences=2, context_tokens=33).blocks_total == 6


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    kv = cache(budget_bytes=cache().block_bytes * 8)
    assert kv.reserve("a", None, [0], 4 * PAGE_TOKENS) == 0
    assert kv.reserve("b", None, [0], 3 * PAGE_TOKENS) is None
    assert kv.blocks_used == 4
    kv.release("a")
    assert kv.blocks_used == 0
    assert kv.reserve("b", None, [0], 6 * PAGE_TOKENS) == 0
