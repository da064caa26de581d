"""Options under /v1 that no call can keep."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.edge.endpoints.schemas_openai import CompletionRequest


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
        {"guided_choice": []},
        {"structured_outputs": {"choice": []}},
        {"best_of": 0},
        {"n": 17},
        {"logprobs": 21},
    ],
)
def test_sampling_options_are_those_that_can_be_kept(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", **field})
    assert len(caught.value.errors()) <= 2
