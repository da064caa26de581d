"""Stock peers on the same random base: transformers' ``generate`` and PEFT, timed by the step.

A step is what one more token of every sequence costs, once the prompts are read: the time of some
tokens less that of the first few of the same requests. The engine is timed likewise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FIRST_TOKENS = 2
_LEAST_S = 1e-9  # a clock may see nothing of a tiny model


def step_s(seconds_of: Callable[[int], float], more_tokens: int, rounds: int = 2) -> float:
    """Seconds of one step.

    Args:
        seconds_of: Of requests with so many new tokens each, from their arrival to the end.
        more_tokens: Beyond the first few.
        rounds: Of which the best counts, of the short requests and of the long ones.
    """
    seconds_of(FIRST_TOKENS)
    short, long = (
        min(seconds_of(tokens) for _ in range(rounds))
        for tokens in (FIRST_TOKENS, FIRST_TOKENS + more_tokens)
    )
    return max(_LEAST_S, long - short) / more_tokens


def generate_s(model: Any, rows: int, new_tokens: int, prompt_tokens: int = 32) -> float:
    """Seconds of one greedy ``generate``, its answer on the host."""
    ids = torch.full((rows, prompt_tokens), 7, device=model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        found.cpu()
    return time.perf_counter() - began


def with_one_adapter(base: Any, folder: Path) -> Any:
    """The base under PEFT with one adapter; wraps ``base``."""
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(
        base, folder, adapter_name="0", autocast_adapter_dtype=False
    )
    return wrapped.eval()
