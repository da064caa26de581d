"""Calls of tools that are required, named or strict, and responses in JSON, by OpenAI's client.

Around the demo's base, which knows nothing of tools: what comes is due to the grammar alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.stand.live import Live, hira

pytestmark = pytest.mark.http

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} <tool_call>\n{% endfor %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}"
)
RATING = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["here", "there"]}},
    "required": ["place"],
    "additionalProperties": False,
}


def tool(name: str, schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


TOOLS = [tool("rate", RATING), tool("go", PLACE)]
NAMED = {"type": "function", "function": {"name": "go"}}
MESSAGES = [{"role": "user", "content": "The film was"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("held")
    (root / "base.jinja").write_text(TEMPLATE)
    template = root / "base.jinja"
    with hira(root / "data", chat_template=template, threads=1, dtype="fp32") as running:
        yield running


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import openai
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as made:
        yield made


def base_of(live: Live) -> str:
    return str(live.client.get("/v1/models").json()["data"][0]["id"])


def check_call(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "rate":
        assert set(value) == {"good", "stars"}
        assert value["stars"] in {1, 2, 3}
    else:
        assert (name, set(value)) == ("go", {"place"})


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_come_comes_whole_and_streamed(
    live: Live, client: Any, choice: Any, seed: int
) -> None:
    asked: dict[str, Any] = {
        "model": base_of(live),
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 150,
        "seed": seed,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    if choice == NAMED:
        assert call.function.name == "go"
    with client.chat.completions.stream(**asked) as stream:
        kinds = {one.type for one in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    (streamed,) = final.message.tool_calls
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments
    assert not final.message.content


def test_several_calls_are_each_held_and_a_cut_one_ends_for_the_length(live: Live) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    for seed in range(2):
        (choice,) = live.client.post(
            "/v1/chat/completions", json={**body, "max_tokens": 120, "seed": seed}
        ).json()["choices"]
        calls = choice["message"]["tool_calls"]
        done = calls if choice["finish_reason"] == "tool_calls" else calls[:-1]
        for call in done:
            check_call(call["function"]["name"], call["function"]["arguments"])
    cut = live.client.post("/v1/chat/completions", json={**body, "max_tokens": 5}).json()
    assert cut["choices"][0]["finish_reason"] == "length"


def test_strict_tools_are_honoured_and_no_field_is_named_as_ignored(live: Live) -> None:
    body = {"messages": MESSAGES, "tools": [tool("go", PLACE, strict=True)], "max_tokens": 20}
    answer = live.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "X-Ignored-Fields" not in answer.headers


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [tool("bad", {"not": {}})]}, "unsupported_grammar", "tools"),
        ({"tools": [tool("bad", {"type": "array"})]}, "unsupported_grammar", "tools"),
        (
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            "invalid_request",
            "response_format",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(
    live: Live, fields: dict[str, Any], code: str, param: str
) -> None:
    body = {"messages": MESSAGES, "tool_choice": "required", "max_tokens": 9, **fields}
    answer = live.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    if param == "tools":
        assert "tool bad: " in error["message"]


def test_a_response_is_held_to_its_format_whole_and_streamed(live: Live, client: Any) -> None:
    written: dict[str, Any] = {"type": "json_schema", "name": "rating", "schema": RATING}
    asked: dict[str, Any] = {
        "model": base_of(live),
        "input": "The film was",
        "max_output_tokens": 150,
        "text": {"format": {**written, "strict": True}},
    }
    whole = client.responses.create(**asked)
    assert whole.status == "completed"
    check_call("rate", whole.output_text)
    assert whole.text.format.name == "rating"
    assert whole.text.format.schema_ == RATING
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    check_call("rate", text)
    anything = client.responses.create(**{**asked, "text": {"format": {"type": "json_object"}}})
    assert anything.output_text.startswith("{")
    bad = {"input": "x", "text": {"format": {**written, "schema": {"not": {}}}}}
    refused = live.client.post("/v1/responses", json=bad)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_grammar", "text.format.schema")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "go"}])
def test_a_response_that_must_call_calls_and_keeps_the_schema(
    live: Live, client: Any, choice: Any
) -> None:
    asked: dict[str, Any] = {
        "model": base_of(live),
        "input": "The film was",
        "tools": [{"type": one["type"], **one["function"], "strict": True} for one in TOOLS],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 150,
    }
    whole = client.responses.create(**asked)
    assert whole.status == "completed"
    (call,) = whole.output
    assert call.type == "function_call"
    check_call(call.name, call.arguments)
    with client.responses.stream(**asked) as stream:
        kinds = {one.type for one in stream}
        (streamed,) = stream.get_final_response().output
    assert "response.function_call_arguments.done" in kinds
    check_call(streamed.name, streamed.arguments)
    if choice != "required":
        assert call.name == streamed.name == "go"
    both = {**asked, "text": {"format": {"type": "json_object"}}}
    refused = live.client.post("/v1/responses", json=both)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "text.format"
