"""Fields under /v1: honoured, ignored and named, or refused."""

from __future__ import annotations

import pytest

from server.edge.endpoints.openai_body import NEUTRAL
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.schemas_openai import CompletionRequest, EmbeddingRequest


def test_unknown_openai_fields_are_ignored_and_named_and_known_ones_refused() -> None:
    body = CompletionRequest.model_validate(
        {
            "model": "m",
            "prompt": "a",
            "x_vendor": 1,
            "nothing": None,
            "a b\r\nSet-Cookie: é": 1,
            "long" * 40: 1,
            "user": "me",
            "suffix": "!",
            "grammar": None,
            "stream_options": {"include_usage": False, "include_obfuscation": True},
        }
    )
    assert body.unsupported() == [("suffix", "!")]
    assert body.ignored() == (
        "x_vendor",
        "a%20b%0D%0ASet-Cookie%3A%20%C3%A9",
        ("long" * 40)[:64],
        "user",
        "stream_options.include_obfuscation",
    )
    embedding = EmbeddingRequest.model_validate({"model": "m", "input": "a", "dimensions": 8})
    assert embedding.unsupported() == [("dimensions", 8)]
    assert embedding.ignored() == ()
    said = {"role": "user", "content": "a", "audio": {"id": "b"}, "refusal": None}
    chat = ChatRequest.model_validate({"messages": [said, said], "store": True})
    assert chat.ignored() == ("store", "messages.audio")
    many = {f"f{at}": 1 for at in range(1000)}
    assert len(CompletionRequest.model_validate({"prompt": "a", **many}).ignored()) == 32


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_pass(name: str) -> None:
    for value in NEUTRAL[name]:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], name: value}
        assert ChatRequest.model_validate(body).unsupported() == []
