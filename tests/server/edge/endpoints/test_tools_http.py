"""Tools over HTTP: by the template, read from the answer, whole and streamed, by OpenAI's client.

In the real processes, around an engine that says what the prompt asks it to say.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.stand.live import Live, fake

pytestmark = pytest.mark.http

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.content }}{% if m.name %}({{ m.name }}){% endif %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.a }}{% endfor %}"
    "{% if m.tool_call_id %}{{ m.tool_call_id }}{% endif %}{% endfor %}"
    "{% if mood %}«{{ mood }}»{% endif %}{{ eos_token }}"
    "{% if reasoning_effort %}«{{ reasoning_effort }}»{% endif %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("tools")
    (root / "base.jinja").write_text(TEMPLATE)
    with fake(root / "data", chat_template=root / "base.jinja") as server:
        yield server


def chat(live: Live, said: str, **fields: Any) -> httpx2.Response:
    body = {"messages": [{"role": "user", "content": f"«{said}»"}], "max_tokens": 500}
    return live.client.post("/v1/chat/completions", json=body | fields)


def choice_of(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert isinstance(choice, dict)
    return choice


def refused(answer: httpx2.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def client_of(live: Live) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import openai
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused")


def test_openais_client_gets_calls_whole_and_streamed(live: Live) -> None:
    said = f"I add. {CALL}\n{CALL.replace('1', '22')}"
    asked: dict[str, Any] = {
        "model": "fake-base",
        "messages": [{"role": "user", "content": f"«{said}»"}],
        "tools": [TOOL],
        "max_tokens": 500,
    }
    with client_of(live) as client:
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content == "I add."
        calls = whole.message.tool_calls
        assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == [
            ("add", {"a": 1}),
            ("add", {"a": 22}),
        ]
        assert len({one.id for one in calls}) == 2
        assert all(one.type == "function" for one in calls)
        with client.chat.completions.stream(**asked) as stream:
            events = [one.type for one in stream]
            final = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in events
        assert events.count("tool_calls.function.arguments.done") == 2
        assert final.finish_reason == "tool_calls"
        assert final.message.content == "I add."
        told = [(one.function.name, one.function.arguments) for one in final.message.tool_calls]
        assert told == [(one.function.name, one.function.arguments) for one in calls]
        # What comes back of it is written out by the template.
        history = [
            {"role": "user", "content": "«yes 1»"},
            whole.message,
            {"role": "tool", "tool_call_id": calls[0].id, "content": "3"},
        ]
        last = client.chat.completions.create(
            model="fake-base", messages=history, tools=[TOOL], max_tokens=500
        )
        assert last.choices[0].message.content == "yes 1"
        wanted = f"[add]<tool_call>«yes 1»I add.add1add223{calls[0].id}</s>"
        assert last.usage.prompt_tokens == len(wanted)


def test_an_answer_without_a_call_is_an_answer(live: Live) -> None:
    for more in ({}, {"stream": True}):
        answer = chat(live, "a <tool and more ", tools=[TOOL], **more)
        if not more:
            choice = choice_of(answer)
            assert choice["message"]["content"] == "a <tool and more "
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == "stop"
        else:
            chunks = [json.loads(one[5:]) for one in answer.text.splitlines()
                      if one.startswith("data: {")]  # fmt: skip
            deltas = [one["choices"][0] for one in chunks]
            assert "".join(one["delta"].get("content", "") for one in deltas) == (
                "a <tool and more "
            )
            assert deltas[-1]["finish_reason"] == "stop"


def test_a_call_that_is_cut_ends_for_the_length(live: Live) -> None:
    cut = CALL.index("1}}")
    choice = choice_of(chat(live, CALL, tools=[TOOL], max_tokens=cut))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": '}
    streamed = chat(live, CALL, tools=[TOOL], max_tokens=cut, stream=True)
    last = [one for one in streamed.text.splitlines() if one.startswith("data: {")][-1]
    assert json.loads(last[5:])["choices"][0]["finish_reason"] == "length"


def test_tool_choice_none_shows_no_tools_and_reads_no_calls(live: Live) -> None:
    choice = choice_of(answer := chat(live, CALL, tools=[TOOL], tool_choice="none"))
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    assert answer.json()["usage"]["prompt_tokens"] == len(f"«{CALL}»</s>")
    ways: tuple[dict[str, Any], ...] = ({}, {"tool_choice": "auto"}, {"tools": []})
    for more in ways:
        assert choice_of(chat(live, CALL, **more))["message"]["content"] == CALL


def test_one_call_alone_is_given_where_one_is_wanted(live: Live) -> None:
    for stream in (False, True):
        answer = chat(
            live, f"{CALL}\n{CALL}", tools=[TOOL], parallel_tool_calls=False, stream=stream
        )
        assert answer.text.count('"name": "add"' if stream else '"name":"add"') == 1


def test_log_probabilities_are_told_of_every_token_that_is_shown(live: Live) -> None:
    asked: dict[str, Any] = {"tools": [TOOL], "logprobs": True}
    whole = choice_of(chat(live, CALL, **asked))["logprobs"]["content"]
    answer = chat(live, CALL, **asked, stream=True)
    chunks = [json.loads(one[5:]) for one in answer.text.splitlines() if one.startswith("data: {")]
    streamed = [
        token
        for one in chunks
        if one["choices"][0]["logprobs"]
        for token in one["choices"][0]["logprobs"]["content"]
    ]
    assert [one["token"] for one in streamed] == [one["token"] for one in whole] == list(CALL)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [TOOL, TOOL]}, ("invalid_request", "tools")),
        ({"tools": [{"type": "function"}]}, ("invalid_request", "tools.0.function")),
        ({"tool_choice": "required"}, ("invalid_request", "tool_choice")),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            ("invalid_request", "tool_choice"),
        ),
        ({"functions": [{"name": "add"}]}, ("unsupported_parameter", "functions")),
        (
            {"chat_template_kwargs": {"moode": 1}},
            ("unsupported_parameter", "chat_template_kwargs.moode"),
        ),
        ({"chat_template_kwargs": {"messages": []}}, ("invalid_request", "chat_template_kwargs")),
        ({"chat_template_kwargs": {"eos_token": ""}}, ("invalid_request", "chat_template_kwargs")),
        ({"chat_template_kwargs": {"self": 1}}, ("invalid_request", "chat_template_kwargs")),
        ({"chat_template_kwargs": {"a b": 1}}, ("invalid_request", "chat_template_kwargs")),
        ({"chat_template": "{{ messages }}"}, ("unsupported_parameter", "chat_template")),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "add"}}]},
            ("unsupported_parameter", "messages"),
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    live: Live, fields: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert refused(chat(live, "x", **fields)) == (400, *expected)


def test_variables_reach_the_template(live: Live) -> None:
    mood = chat(live, "x", chat_template_kwargs={"mood": "so glad"})
    assert choice_of(mood)["message"]["content"] == "so glad"
    effort = chat(live, "x", reasoning_effort="low")
    assert choice_of(effort)["message"]["content"] == "low"
    assert choice_of(chat(live, "x", chat_template_kwargs={}))["message"]["content"] == "x"


def test_parts_of_tools_without_effect_are_named(live: Live) -> None:
    other = {**TOOL, "function": {**TOOL["function"], "returns": "a sum"}}
    answer = chat(live, "x", tools=[other])
    assert answer.headers["X-Ignored-Fields"] == "tools.function.returns"


@pytest.mark.parametrize(
    ("template", "setting", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}<tool_call>", "auto", "does not know"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}", "auto", "is not known"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}", "mistral", None),
    ],
)
def test_a_template_must_know_tools_and_how_they_are_called(
    tmp_path: Path, template: str, setting: str, expected: str | None
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    with fake(
        tmp_path / "data", chat_template=tmp_path / "own.jinja", tool_format=setting
    ) as server:
        said = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}}]'
        answer = chat(server, said, tools=[TOOL])
        if expected is None:
            (call,) = choice_of(answer)["message"]["tool_calls"]
            assert call["function"] == {"name": "add", "arguments": '{"a": 2}'}
            assert len(call["id"]) == 9
        else:
            assert refused(answer) == (400, "unsupported_parameter", "tools")
            assert expected in answer.json()["error"]["message"]
