"""How many tokens a step reads, by what the device has free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.generation.prefill import prefill_tokens_of, tokens_within
from tests.stand.dense import Stage, options, prompts

GIB = 1 << 30
SMALL = SimpleNamespace(hidden_size=2048, intermediate_size=8192)
LARGE = SimpleNamespace(hidden_size=4096, intermediate_size=14336)


@pytest.mark.parametrize(
    ("free_bytes", "config", "tokens"),
    [
        (-GIB, LARGE, 1024),
        (GIB // 2, LARGE, 1024),
        (2 * GIB, LARGE, 2048),
        (2 * GIB, SMALL, 4096),
        (80 * GIB, LARGE, 8192),
        (80 * GIB, SimpleNamespace(hidden_size=64), 8192),
    ],
)
def test_more_memory_reads_more_tokens(free_bytes: int, config: Any, tokens: int) -> None:
    found = tokens_within(free_bytes, config, 2)
    assert found == tokens
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    if found > 1024:
        assert found * (3 * inner + 6 * config.hidden_size) * 2 <= free_bytes / 4


def test_what_was_asked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    cpu: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * GIB, 80 * GIB))
    assert prefill_tokens_of(options(prefill_tokens=77), LARGE, gpu) == 77
    assert prefill_tokens_of(options(prefill_tokens=None), LARGE, gpu) == 8192
    budgets = options(prefill_tokens=None, kv_bytes=38 * GIB, device_bytes=GIB)
    assert prefill_tokens_of(budgets, LARGE, gpu) == 1024
    assert prefill_tokens_of(options(prefill_tokens=None), LARGE, cpu) == 1024
    window = SimpleNamespace(**vars(LARGE), sliding_window=4096)
    assert prefill_tokens_of(options(prefill_tokens=None), window, gpu) == 1024


def test_a_lane_without_the_setting_answers() -> None:
    stage = Stage(prefill_tokens=None)
    (prompt,) = prompts(1, 40)
    found = stage.answer("a", prompt, ignore_eos=True, max_new_tokens=4)
    assert [token.id for token in found.tokens] == stage.reference(
        "a", prompt, 4, eos_token_id=None
    )
