"""How many words a fill-mask request may ask for: each is written out with the whole text around
it, by the thread that the model runs on, so a small body could keep everybody waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from adapters.tasks import BY_NAME
from server.errors import Refusal
from server.inputs.text import Text
from server.messages import TokenizedInput

WORDS_MAX: Final = 1 << 16  # of one request, over its inputs and their masks
SEQUENCE_TOKENS_MAX: Final = 1 << 20  # of all texts that are written out for them


def check_words(
    inputs: Sequence[Any], text: Text, *, top_k: int | None, targets: Sequence[int] | None
) -> None:
    """Refuse a request that asks for more words than an answer may hold.

    Args:
        inputs: `ModelInput`.
        text: The base's tokenizer.
        top_k: Words per mask, or None.
        targets: Token ids to choose from, or None.

    Raises:
        Refusal: request_too_large.
    """
    if targets is None:
        each = min(top_k or BY_NAME["fill-mask"].default_top_k or 1, text.vocab_size or 1 << 62)
    else:
        each = min(top_k or len(targets), len(targets))
    words = tokens = 0
    for one in inputs:
        assert isinstance(one, TokenizedInput)
        masks = one.token_ids.count(text.mask_id) if text.mask_id is not None else 0
        words += masks * each
        tokens += masks * each * one.tokens
    if words > WORDS_MAX:
        found, expected = f"{words} words", f"at most {WORDS_MAX}"
    elif tokens > SEQUENCE_TOKENS_MAX:
        found = f"{words} words in texts of {tokens} tokens together"
        expected = f"texts of at most {SEQUENCE_TOKENS_MAX} tokens together"
    else:
        return
    raise Refusal.because(
        "request_too_large",
        "The request asks for more words than an answer may hold.",
        found=found,
        expected=expected,
        fix="Ask for fewer words (top_k, targets), or send fewer masks or shorter texts.",
        field="inputs" if top_k is None and targets is None else "parameters",
    )
