"""Fields under /v1: honoured, ignored and named, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.edge.endpoints.openai_body import NEUTRAL, OpenAIBody
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.schemas_openai import CompletionRequest, EmbeddingRequest
from server.edge.endpoints.schemas_ranking import DocumentsRequest, ScoreRequest
from server.edge.endpoints.schemas_responses import ResponseRequest
from server.edge.endpoints.schemas_tokens import TokenizePromptRequest
from server.errors import Refusal


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
    history: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "parsed": 1}, "index": 0}]},
    ]
    schema = {"name": "n", "schema": {}, "description": "d"}
    held = {"response_format": {"type": "json_schema", "json_schema": schema}}
    chat = ChatRequest.model_validate({"messages": history, **held})
    assert chat.ignored() == (
        "response_format.json_schema.description",
        "messages.content.cache_control",
        "messages.tool_calls.index",
        "messages.tool_calls.function.parsed",
    )
    ranked = DocumentsRequest.model_validate(
        {"query": "a", "documents": ["b", {"text": "c", "title": "d"}]}
    )
    assert ranked.ignored() == ("documents.title",)
    part: dict[str, Any] = {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}
    output: dict[str, Any] = {"type": "message", "role": "assistant", "content": [part]}
    items = [output | {"id": "m", "status": "completed"}, {"role": "user", "content": "b", "x": 1}]
    assert ResponseRequest.model_validate({"input": items}).ignored() == ("input.x",)
    part["y"] = 1
    assert ResponseRequest.model_validate({"input": items}).ignored() == (
        "input.x", "input.content.y",
    )  # fmt: skip
    many = {f"f{at}": 1 for at in range(1000)}
    assert len(CompletionRequest.model_validate({"prompt": "a", **many}).ignored()) == 32


@pytest.mark.parametrize("name", ["adapter", "adapter_id"])
def test_an_adapter_that_is_not_named_as_the_model_is_no_silence(name: str) -> None:
    bodies: list[tuple[type[OpenAIBody], dict[str, Any]]] = [
        (CompletionRequest, {"prompt": "a"}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
        (EmbeddingRequest, {"input": "a"}),
        (ResponseRequest, {"input": "a"}),
        (DocumentsRequest, {"query": "a", "documents": ["b"]}),
        (ScoreRequest, {"text_1": "a", "text_2": "b"}),
        (TokenizePromptRequest, {"prompt": "a"}),
    ]
    for kind, own in bodies:
        with pytest.raises(Refusal) as refused:
            kind.model_validate({**own, name: "story"}).check_supported()
        (fault,) = refused.value.faults
        assert (fault.code, fault.field) == ("unsupported_parameter", name)
        assert "model" in (fault.fix or "")


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_pass(name: str) -> None:
    for value in NEUTRAL[name]:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], name: value}
        assert ChatRequest.model_validate(body).unsupported() == []
