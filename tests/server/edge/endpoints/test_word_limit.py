"""How many words a fill-mask request may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from server.edge.endpoints.word_limit import SEQUENCE_TOKENS_MAX, WORDS_MAX, check_words
from server.errors import Refusal
from server.messages import TokenizedInput

MASK, VOCABULARY = 4, 30_000


class Masks:
    mask_id = MASK
    vocab_size = VOCABULARY


def check(
    masks: int, length: int, inputs: int = 1, top_k: int | None = None, targets: int | None = None
) -> None:
    text: Any = Masks()
    one = TokenizedInput((MASK,) * masks + (9,) * (length - masks))
    check_words(
        [one] * inputs, text, top_k=top_k, targets=tuple(range(targets)) if targets else None
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"masks": 1, "length": 512, "inputs": 256},  # what a full request gets by default
        {"masks": 1, "length": 30, "top_k": 1 << 20},  # the whole vocabulary, once
        {"masks": 2, "length": 2, "top_k": WORDS_MAX // 2 + 1},  # as many as there are
        {"masks": 32, "length": 32, "targets": 1024},
        {"masks": 512, "length": 512, "top_k": 3, "targets": 1024},
    ],
)
def test_what_is_asked_for_in_earnest_passes(asked: dict[str, int]) -> None:
    check(**asked)


@pytest.mark.parametrize(
    ("asked", "found", "field"),
    [
        ({"masks": 512, "length": 512}, "2560 words in texts", "inputs"),
        (
            {"masks": 512, "length": 512, "top_k": 1 << 20},
            f"{512 * VOCABULARY} words",
            "parameters",
        ),
        ({"masks": 1, "length": 8, "inputs": 256, "top_k": 257}, "65792 words", "parameters"),
        ({"masks": 65, "length": 65, "targets": 1024}, "66560 words", "parameters"),
        ({"masks": 1, "length": 512, "top_k": 2049}, "2049 words in texts", "parameters"),
    ],
)
def test_more_is_refused(asked: dict[str, int], found: str, field: str) -> None:
    with pytest.raises(Refusal, match="request_too_large") as caught:
        check(**asked)
    (fault,) = caught.value.faults
    assert str(fault.found).startswith(found)
    assert str(fault.expected).endswith((str(WORDS_MAX), f"{SEQUENCE_TOKENS_MAX} tokens together"))
    assert fault.field == field
