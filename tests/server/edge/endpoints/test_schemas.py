"""Bodies of the native calls: unknown fields are errors."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.edge.endpoints.schemas import (
    GenerateParameters,
    GenerateRequestBody,
    PredictRequest,
)
from server.edge.endpoints.schemas_admin import PatchRequest


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
