"""/v1/responses by OpenAI's client, unchanged, around an engine that says what it is asked to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.stand.live import Live, fake

pytestmark = pytest.mark.http

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.id }}{% endfor %}"
    "{% if m.tool_call_id %}{{ m.tool_call_id }}{% endif %};{% endfor %}"
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("responses")
    (root / "base.jinja").write_text(TEMPLATE)
    with fake(root / "data", chat_template=root / "base.jinja") as server:
        yield server


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import openai
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as made:
        yield made


def respond(live: Live, **fields: Any) -> httpx2.Response:
    return live.client.post("/v1/responses", json={"input": "«yes»", **fields})


def test_a_text_is_answered_with_a_text(client: Any) -> None:
    found = client.responses.create(
        model="fake-base",
        instructions="Be kind.",
        input="«good day»",
        max_output_tokens=50,
        store=False,
        metadata={"a": "b"},
    )
    assert found.output_text == "good day"
    assert (found.status, found.incomplete_details, found.error) == ("completed", None, None)
    assert found.usage.input_tokens == len("system:Be kind.;user:«good day»;")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert (found.model, found.metadata, found.store) == ("fake-base", {"a": "b"}, False)
    assert found.output[0].role == "assistant"


def test_a_conversation_goes_on_with_what_came_of_it(client: Any) -> None:
    first = client.responses.create(model="fake-base", input="«one»")
    given: list[Any] = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": "«one»"}]},
        *first.output,
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"role": "user", "content": "«two»"},
    ]
    second = client.responses.create(model="fake-base", input=given)
    assert second.output_text == "two"
    wanted = "system:x;user:«one»;assistant:onefc1;tool:3c1;user:«two»;"
    assert second.usage.input_tokens == len(wanted)


def test_a_stream_has_openais_events_in_their_order(client: Any, live: Live) -> None:
    with client.responses.stream(model="fake-base", input="«good day»") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "good day"
    kinds = [one.type for one in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [one.sequence_number for one in events] == list(range(len(events)))
    deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
    assert "".join(deltas) == "good day"
    lines = respond(live, stream=True).text.splitlines()
    named = [one[7:] for one in lines if one.startswith("event: ")]
    typed = [json.loads(one[6:])["type"] for one in lines if one.startswith("data: ")]
    assert named == typed
    assert "[DONE]" not in lines[-1]


def test_an_answer_that_is_cut_is_incomplete(live: Live) -> None:
    answer = respond(live, input="«a long one»", max_output_tokens=6).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["content"][0]["text"] == "a long"
    assert answer["output"][0]["status"] == "incomplete"
    stream = respond(live, input="«a long one»", max_output_tokens=6, stream=True).text
    assert "event: response.incomplete\n" in stream
    assert "response.completed" not in stream


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"previous_response_id": "resp_1"}, ("unsupported_parameter", "previous_response_id")),
        ({"conversation": "conv_1"}, ("unsupported_parameter", "conversation")),
        ({"background": True}, ("unsupported_parameter", "background")),
        ({"tools": [{"type": "web_search"}]}, ("unsupported_parameter", "tools")),
        ({"reasoning": {"effort": "low"}}, ("unsupported_parameter", "reasoning")),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            ("unsupported_grammar", "text.format"),
        ),
        ({"text": {"format": {"type": "grammar"}}}, ("invalid_request", "text.format.type")),
        ({"text": {"verbosity": "low"}}, ("invalid_request", "text.verbosity")),
        ({"top_logprobs": 3}, ("unsupported_parameter", "top_logprobs")),
        ({"truncation": "auto"}, ("unsupported_parameter", "truncation")),
        ({"max_output_tokens": 9999}, ("invalid_request", "max_output_tokens")),
        ({"input": []}, ("invalid_request", None)),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    live: Live, fields: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    answer = respond(live, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, expected[0])
    if expected[1] is not None:
        assert error["param"] == expected[1]


def test_nothing_is_kept(live: Live) -> None:
    answer = respond(live, store=True, user="me")
    assert answer.json()["store"] is False
    assert set(answer.headers["X-Ignored-Fields"].split(", ")) == {"store", "user"}
    kept = live.client.get(f"/v1/responses/{answer.json()['id']}")
    assert kept.status_code in (404, 405)
