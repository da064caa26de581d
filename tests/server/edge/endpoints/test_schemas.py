"""Bodies: unknown fields are errors under native paths, OpenAI's rule holds under /v1."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.edge.endpoints.openai_body import NEUTRAL
from server.edge.endpoints.schemas import (
    GenerateParameters,
    GenerateRequestBody,
    PatchRequest,
    PredictRequest,
)
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.schemas_openai import CompletionRequest, EmbeddingRequest


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("one", "one"),
        (["one"], ["one"]),
        (["one", "two"], ("one", "two")),
        ([["a", "b"], "c"], [("a", "b"), "c"]),
    ],
)
def test_predict_inputs(inputs: Any, expected: Any) -> None:
    if inputs == ["one", "two"]:
        # A list of two texts is two inputs: a pair must be inside a list.
        expected = inputs
    assert PredictRequest.model_validate({"inputs": inputs}).inputs == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": None},
        {"inputs": [["a", "b", "c"]]},
        {"inputs": "a", "topk": 1},
        {"inputs": "a", "parameters": {"top_k": 0}},
        {"inputs": "a", "parameters": {"topk": 1}},
    ],
)
def test_predict_refuses(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PredictRequest.model_validate(body)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"best_of": 17},
        {"top_n_tokens": 21},
        {"frequency_penalty": 2.5},
        {"watermark": True},
        {"typical_p": 0},
        {"typical_p": 1.5},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"seed": -1},
        {"beam_width": 4},
    ],
)
def test_generate_refuses_what_it_cannot_honour(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateRequestBody.model_validate({"inputs": "a", "parameters": parameters})


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": True},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 5.0},
        {"temperature": "1"},
        {"temperature": True},
        {"seed": "1"},
        {"do_sample": 1},
        {"details": "yes"},
        {"best_of": True},
    ],
)
def test_numbers_and_booleans_are_those_of_json(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateRequestBody.model_validate({"inputs": "a", "parameters": parameters})
    (name,) = parameters
    assert {one["loc"][:2] for one in caught.value.errors()} == {("parameters", name)}


def test_a_whole_number_is_a_number() -> None:
    parameters = GenerateParameters.model_validate({"temperature": 1, "top_p": 1, "best_of": 1})
    assert parameters.temperature == 1.0


def test_sampling_parameters_switch_sampling_on() -> None:
    assert not GenerateParameters().samples
    assert GenerateParameters(temperature=0.5).samples
    assert GenerateParameters(top_k=5).samples
    assert GenerateParameters(do_sample=True).samples


def test_patch_needs_something_to_change() -> None:
    with pytest.raises(ValidationError, match="nothing to change"):
        PatchRequest.model_validate({})


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


@pytest.mark.parametrize(
    "field",
    [
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {str(one): 1 for one in range(1025)}},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"min_p": 1.1},
        {"typical_p": 0},
        {"min_tokens": -1},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 257},
        {"allowed_token_ids": []},
        {"allowed_token_ids": ["x"]},
        {"stop_token_ids": [1] * 70_000},
        {"best_of": 0},
        {"n": 17},
        {"logprobs": 21},
    ],
)
def test_sampling_options_are_those_that_can_be_kept(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", **field})
    assert len(caught.value.errors()) <= 2


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_pass(name: str) -> None:
    for value in NEUTRAL[name]:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], name: value}
        assert ChatRequest.model_validate(body).unsupported() == []


def test_chat_content_parts_are_joined_and_other_kinds_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": parts}]}
    )
    assert body.messages[0].plain() == {"role": "user", "content": "ab"}
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
        )
