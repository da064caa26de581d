"""Streams in OpenAI's shape: they tell what the whole answer tells."""

from __future__ import annotations

from typing import Any

import pytest

from server.edge.endpoints.openai_format import ChatFormat, CompletionFormat, stream_chunks
from server.messages import Alternative, GeneratedToken, GenerateResult, TokenEvent
from tests.stand.streams import chunks_of

# Each token's own text, and what is shown when it comes: "lo" is held back, as a stop string may
# begin with it, and "é" has two tokens.
TOKENS = (("Hel", "Hel"), ("lo", ""), (" there", "lo there"), ("", ""), ("é", "é"), ("", ""))
LOGPROBS = [-0.1 * (at + 1) for at in range(len(TOKENS))]


def told() -> tuple[list[TokenEvent], GenerateResult]:
    events, tokens = [], []
    for at, ((own, shown), logprob) in enumerate(zip(TOKENS, LOGPROBS, strict=True)):
        special = at == len(TOKENS) - 1
        others = (Alternative(50 + at, f"x{at}", -3.0, special=False),)
        spelling = None if own == shown else own
        events.append(TokenEvent("a", at, shown, logprob, special, others, spelling))
        tokens.append(GeneratedToken(at, own, logprob, special, others))
    text = "".join(shown for _, shown in TOKENS)
    result = GenerateResult("a", text, "", tuple(tokens), "eos_token", None, 3, 0.0, 0.0)
    return events, result


@pytest.mark.parametrize("echoed", [None, ["So: "]])
def test_completions_tell_every_token_and_where_it_stands(echoed: list[str] | None) -> None:
    def shape() -> CompletionFormat:
        return CompletionFormat("c", 0, "m", echoed, logprobs=True, alternatives=1)

    events, result = told()
    (whole,) = shape().answer([result], 1)["choices"]
    found: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    text = ""
    for chunk in chunks_of(stream_chunks, shape(), [*events, result]):
        (choice,) = chunk["choices"]
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            found[name] += values
    assert (text, found) == (whole["text"], whole["logprobs"])
    assert found["token_logprobs"] == LOGPROBS


def test_chats_tell_every_token_that_is_text() -> None:
    def shape(*, logprobs: bool) -> ChatFormat:
        return ChatFormat("c", 0, "m", logprobs=logprobs, alternatives=1)

    events, result = told()
    (whole,) = shape(logprobs=True).answer([result], 1)["choices"]
    found, text = [], ""
    streamed = chunks_of(stream_chunks, shape(logprobs=True), [*events, result])
    assert len(streamed) == 2 + len(LOGPROBS[:-1])
    for chunk in streamed:
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content", "")
        found += (choice["logprobs"] or {"content": []})["content"]
    assert (text, found) == (whole["message"]["content"], whole["logprobs"]["content"])
    assert [one["logprob"] for one in found] == LOGPROBS[:-1]
    # Where nobody asks for them, there are no chunks without a text.
    plain = chunks_of(stream_chunks, shape(logprobs=False), [*events, result])
    assert len(plain) == 2 + sum(bool(shown) for _, shown in TOKENS)
