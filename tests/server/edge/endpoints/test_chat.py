"""An adapter's own defaults and end tokens in a request's options, and messages as templates
take them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.edge.endpoints.chat import with_defaults
from server.edge.endpoints.schemas_conversation import ChatMessage
from server.edge.target import Target
from server.messages import SamplingOptions

OWN = {"do_sample": True, "temperature": 0.6, "top_k": -1, "end_ids": [5, 7], "max_new_tokens": 9}
ASKED = SamplingOptions(max_new_tokens=4, top_p=0.5, top_k=3)


def target(**generation: Any) -> Target:
    return Target("it", "v", "text-generation", generation=generation)


def test_what_a_request_leaves_out_is_the_adapters_and_what_it_says_is_its_own() -> None:
    assert with_defaults(ASKED, target(), {"top_p"}) == ASKED
    found = with_defaults(ASKED, target(**OWN), {"top_p"})
    assert found == SamplingOptions(
        max_new_tokens=4, do_sample=True, temperature=0.6, top_p=0.5, top_k=0, end_ids=(5, 7)
    )
    said = {"top_p", "top_k", "temperature", "do_sample"}
    assert with_defaults(ASKED, target(**OWN), said) == SamplingOptions(
        max_new_tokens=4, top_p=0.5, top_k=3, end_ids=(5, 7)
    )


def test_a_message_keeps_what_it_says_and_nothing_else() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": '{"x": [1]}'}, "index": 0}
    message = ChatMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
    )
    assert message.plain() == {
        "role": "assistant",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
        ],
    }
    tool = ChatMessage.model_validate({"role": "tool", "tool_call_id": "a", "name": "f"})
    assert tool.plain() == {"role": "tool", "content": "", "name": "f", "tool_call_id": "a"}
    told = ChatMessage.model_validate({"role": "developer", "content": "x"})
    assert told.plain() == {"role": "system", "content": "x"}
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert ChatMessage.model_validate({"role": "user", "content": parts}).plain() == {
        "role": "user", "content": "xy",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", ["", "not json", "[1]", "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    assert message.plain()["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("calls", [[{}], "x", [{"function": {}}], [{"type": "else"}]])
def test_calls_of_another_shape_are_refused(calls: Any) -> None:
    with pytest.raises(ValidationError):
        ChatMessage.model_validate({"role": "assistant", "tool_calls": calls})
