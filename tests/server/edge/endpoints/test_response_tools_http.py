"""Functions in /v1/responses: shown by the template, called whole and streamed, by OpenAI's client.

In the real processes, around an engine that says what the prompt asks it to say. What comes is held
to the client's own types, which the client itself does not check.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import TypeAdapter

from tests.stand.live import Live, fake

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import openai
    from openai.types.responses import Response, ResponseStreamEvent

pytestmark = pytest.mark.http

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.a }}{{ c.id }}"
    "{% endfor %}{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %};{% endfor %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("response-tools")
    (root / "base.jinja").write_text(TEMPLATE)
    with fake(root / "data", chat_template=root / "base.jinja") as server:
        yield server


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as made:
        yield made


def respond(live: Live, said: str, **fields: Any) -> httpx2.Response:
    body = {"input": f"«{said}»", "tools": [TOOL], "max_output_tokens": 500}
    return live.client.post("/v1/responses", json=body | fields)


def whole(live: Live, said: str, **fields: Any) -> Response:
    answer = respond(live, said, **fields)
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=True)


def streamed(live: Live, said: str, **fields: Any) -> list[Any]:
    lines = respond(live, said, stream=True, **fields).text.splitlines()
    events = [json.loads(one[6:]) for one in lines if one.startswith("data: ")]
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    return [EVENTS.validate_python(one) for one in events]


def shown(response: Response) -> list[Any]:
    """Items as they matter: texts, and calls with their arguments."""
    found: list[Any] = []
    for one in response.output:
        if one.type == "message":
            found.append("".join(part.text for part in one.content if part.type == "output_text"))
        elif one.type == "function_call":
            found.append((one.name, one.arguments))
    return found


SAID = {
    "words and two calls": f"I add. {CALL}\n{CALL.replace('1', '22')}",
    "a call alone": CALL,
    "words after a call": f"{CALL} and more",
    "words alone": "nothing <tool to call",
    "nothing": "",
}
EXPECTED: dict[str, list[Any]] = {
    "words and two calls": ["I add.", ("add", '{"a": 1}'), ("add", '{"a": 22}')],
    "a call alone": [("add", '{"a": 1}')],
    "words after a call": [("add", '{"a": 1}'), " and more"],
    "words alone": ["nothing <tool to call"],
    "nothing": [""],
}


@pytest.mark.parametrize("case", SAID)
def test_calls_and_words_are_items_whole_and_streamed(live: Live, case: str) -> None:
    answer = whole(live, SAID[case])
    assert shown(answer) == EXPECTED[case]
    assert answer.status == "completed"
    assert {one.status for one in answer.output} == {"completed"}  # type: ignore[union-attr]
    assert len({one.id for one in answer.output}) == len(answer.output)
    events = streamed(live, SAID[case])
    last = events[-1]
    assert last.type == "response.completed"
    assert shown(last.response) == EXPECTED[case]
    # What the events tell, put together, is the response that the last one has.
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for one in events:
        match one.type:
            case "response.output_item.added":
                assert one.output_index == len(items)
                assert one.item.status == "in_progress"
                items.append(one.item.model_dump())
                texts.append("")
            case "response.output_text.delta" | "response.function_call_arguments.delta":
                assert one.item_id == items[one.output_index]["id"]
                assert one.output_index == len(items) - 1
                texts[-1] += one.delta
            case "response.output_text.done":
                assert one.text == texts[one.output_index]
            case "response.function_call_arguments.done":
                assert one.arguments == texts[one.output_index]
            case "response.output_item.done":
                assert one.item == last.response.output[one.output_index]
    told = [
        text if item["type"] == "message" else (item["name"], text)
        for item, text in zip(items, texts, strict=True)
    ]
    assert told == EXPECTED[case]
    assert sum(one.type == "response.output_item.done" for one in events) == len(items)


def test_openais_client_gathers_a_stream_and_goes_on_with_what_came(
    live: Live, client: openai.OpenAI
) -> None:
    said = f"I add. {CALL}"
    asked: dict[str, Any] = {"model": "fake-base", "tools": [TOOL], "max_output_tokens": 500}
    with client.responses.stream(input=f"«{said}»", **asked) as stream:
        kinds = {one.type for one in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    assert shown(final) == ["I add.", ("add", '{"a": 1}')]
    call = final.output[1]
    assert call.type == "function_call"
    history: list[Any] = [
        {"role": "user", "content": "«yes»"},
        *final.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
        {
            "type": "function_call_output",
            "call_id": "other",
            "output": [{"type": "input_text", "text": "4"}],
        },
    ]
    last = client.responses.create(input=history, **asked)
    assert last.output_text == "yes"
    assert last.usage is not None
    wanted = (
        f"[add]<tool_call>user:«yes»;assistant:I add.add1{call.call_id};"
        f"tool:3={call.call_id};tool:4=other;"
    )
    assert last.usage.input_tokens == len(wanted)


def test_a_call_that_is_cut_is_incomplete_and_keeps_what_came(live: Live) -> None:
    cut = CALL.index("1}}")
    answer = whole(live, CALL, max_output_tokens=cut)
    assert (answer.status, shown(answer)) == ("incomplete", [("add", '{"a": ')])
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    events = streamed(live, CALL, max_output_tokens=cut)
    assert events[-1].type == "response.incomplete"
    assert shown(events[-1].response) == [("add", '{"a": ')]


def test_what_was_asked_is_told_back(live: Live) -> None:
    free = whole(live, "yes")
    assert (free.tool_choice, free.parallel_tool_calls) == ("auto", True)
    (tool,) = free.tools
    assert tool.model_dump(exclude_unset=True) == TOOL
    none = whole(live, CALL, tool_choice="none", parallel_tool_calls=False)
    assert (none.tool_choice, none.parallel_tool_calls) == ("none", False)
    assert shown(none) == [CALL]  # no tools are shown and no calls are read
    assert none.usage is not None
    assert none.usage.input_tokens == len(f"user:«{CALL}»;")
    bare = Response.model_validate(respond(live, "yes", tools=None).json(), strict=True)
    assert (bare.tools, bare.tool_choice) == ([], "auto")


def test_one_call_alone_is_given_where_one_is_wanted(live: Live) -> None:
    said = f"{CALL}\n{CALL}"
    assert len(whole(live, said, parallel_tool_calls=False).output) == 1
    assert len(whole(live, said).output) == 2
    events = streamed(live, said, parallel_tool_calls=False)
    assert len(events[-1].response.output) == 1


def test_parts_of_tools_without_effect_are_named(live: Live) -> None:
    answer = respond(live, "x", tools=[{**TOOL, "returns": "a sum"}])
    assert answer.headers["X-Ignored-Fields"] == "tools.returns"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [TOOL, TOOL]}, ("invalid_request", "tools")),
        ({"tools": [{"type": "web_search"}]}, ("unsupported_parameter", "tools")),
        ({"tools": [{"type": "custom", "name": "x"}]}, ("unsupported_parameter", "tools")),
        ({"tools": [{"type": "function"}]}, ("unsupported_parameter", "tools")),
        ({"tools": [{**TOOL, "name": "a b"}]}, ("invalid_request", "tools.0.name")),
        ({"tools": None, "tool_choice": "required"}, ("invalid_request", "tool_choice")),
        (
            {"tool_choice": {"type": "function", "name": "sub"}},
            ("invalid_request", "tool_choice"),
        ),
        ({"tool_choice": {"type": "web_search"}}, ("unsupported_parameter", "tool_choice")),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            ("unsupported_parameter", "tool_choice"),
        ),
        ({"max_tool_calls": 1}, ("unsupported_parameter", "max_tool_calls")),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    live: Live, fields: dict[str, Any], expected: tuple[str, str]
) -> None:
    answer = respond(live, "x", **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, *expected)
