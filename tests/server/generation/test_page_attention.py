"""Attention over pages by their tables, in torch and as torch's own kernel is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from server.base.varlen import varlen_obstacle
from server.generation.attention import Call, PagedBatch, PagedKeys, Span
from server.generation.kv_cache import KVCache
from server.generation.page_attention import (
    Pages,
    VarlenBatch,
    decode_by_varlen,
    decode_in_torch,
)
from tests.stand.row_attention import attend_row_by_row

HEADS, KV_HEADS, DIM = 4, 2, 8


def filled(window: int | None, page_tokens: int, seed: int) -> tuple[KVCache, list[Span]]:
    config: Any = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=2,
        vocab_size=32,
    )
    if window is not None:
        config.sliding_window = window
        config.layer_types = ["full_attention", "sliding_attention"]
    kv = KVCache(
        config,
        budget_bytes=4 << 20,
        max_sequences=8,
        context_tokens=512,
        dtype=torch.float32,
        device=torch.device("cpu"),
        step_tokens=64,
        page_tokens=page_tokens,
    )
    generator = torch.Generator().manual_seed(seed)
    spans: list[Span] = []
    start = 0
    for name in range(5):
        past = int(torch.randint(0, 400, (), generator=generator))
        rows = int(torch.randint(1, 60, (), generator=generator)) if name % 2 else 1
        rows, past = (rows, 0) if name == 3 else (rows, past + 1)
        assert kv.reserve(f"s{name}", None, [0] * 3, past + rows) == 0
        spans.append(Span(f"s{name}", start, rows, past))
        start += rows
    for layer in range(2):
        for pages in kv.pages_of(layer):
            pages.normal_(generator=generator)
    return kv, spans


def call_of(rows: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return Call(q, k, v, torch.full((rows, HEADS, DIM), torch.nan), None, None)


@pytest.mark.parametrize("page_tokens", [16, 256])
@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("seed", range(2))
def test_tables_say_what_the_other_plan_does(
    window: int | None, page_tokens: int, seed: int
) -> None:
    kv, spans = filled(window, page_tokens, seed)
    before = [[one.clone() for one in kv.pages_of(layer)] for layer in range(2)]
    for layer in range(2):
        plans: list[PagedKeys] = [PagedBatch(kv, spans), VarlenBatch(kv, spans, attend_row_by_row)]
        answers: list[torch.Tensor] = []
        held: list[torch.Tensor] = []
        for plan in plans:
            for pages, was in zip(kv.pages_of(layer), before[layer], strict=True):
                pages.copy_(was)
            call = call_of(spans[-1].stop, seed)
            plan.attend(layer, call)
            answers.append(call.out)
            held.append(kv.pages_of(layer)[0][2:].clone())  # the spare pages are nobody's
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(held[0], held[1])


@pytest.mark.parametrize("window", [None, 1, 33])
def test_one_row_a_sequence_in_torch_is_the_row_by_row_answer(window: int | None) -> None:
    torch.manual_seed(3)
    rows, many, page = 6, 5, 16
    keys, values = (torch.randn(40, page, KV_HEADS, DIM) for _ in range(2))
    tables = torch.randint(2, 40, (rows, many), dtype=torch.int32)
    lengths = torch.tensor([1, 15, 16, 17, 79, 80], dtype=torch.int32)
    pages = Pages(keys, values, tables, lengths, window)
    found, wanted = call_of(rows, 1), call_of(rows, 1)
    decode_in_torch(found, pages)
    attend_row_by_row(wanted, pages, torch.arange(rows + 1, dtype=torch.int32), 1)
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "given"), [(None, (-1, 0)), (20, (19, 0))])
def test_torchs_kernel_is_given_tables_and_one_split(
    window: int | None, given: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen as torchs

    asked: dict[str, Any] = {}

    def stand_in(*arguments: Any, **named: Any) -> None:
        asked.update(named)
        asked["arguments"] = arguments

    monkeypatch.setattr(torchs, "varlen_attn_out", stand_in)
    keys, values = (torch.randn(9, 256, KV_HEADS, DIM) for _ in range(2))
    tables = torch.randint(2, 9, (3, 2), dtype=torch.int32)
    lengths = torch.tensor([1, 256, 257], dtype=torch.int32)
    call = call_of(3, 1)
    decode_by_varlen(call, Pages(keys, values, tables, lengths, window))
    out, query, k, v, starts, of_keys, most_rows, most_keys = asked.pop("arguments")
    assert out is call.out
    assert query is call.query
    assert (k is keys, v is values, of_keys) == (True, True, None)
    assert (starts.tolist(), most_rows, most_keys) == ([0, 1, 2, 3], 1, 512)
    assert asked["num_splits"] == 1
    assert asked["window_size"] == given
    assert asked["enable_gqa"] is True
    assert asked["block_table"] is tables
    assert asked["seqused_k"] is lengths


def test_the_kernel_is_not_used_where_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    assert varlen_obstacle(64, torch.bfloat16, cpu, capped=False) == "device cpu"
