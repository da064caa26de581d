"""Answers held to a grammar over HTTP: every field that clients have, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.demo import ADAPTERS_DIR
from tests.stand.live import Live, hira
from tests.stand.waits import until

pytestmark = pytest.mark.http

SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}
PATTERN = "[a-c]{4,6}"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("structured")
    template = root / "base.jinja"
    template.write_text(TEMPLATE)
    with hira(root / "data", chat_template=template, threads=1, dtype="fp32") as running:
        yield running


def is_object(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"good", "stars"} and value["stars"] in {1, 2, 3}


def fits_pattern(text: str) -> bool:
    return re.fullmatch(PATTERN, text) is not None


def is_choice(text: str) -> bool:
    return text in {"yes", 'no: "é"'}


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[0-9](\+[0-9]){0,30}", text) is not None


def is_any_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


CHOICES = ["yes", 'no: "é"']
SUM = 'start: DIGIT ("+" DIGIT)~0..3\nDIGIT: /[0-9]/'
GBNF = 'root ::= [0-9] ("+" [0-9])?'
NAMED = {"name": "rating", "schema": SCHEMA, "strict": True}
FIELDS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, is_object),
    ({"response_format": {"type": "json", "value": SCHEMA}}, is_object),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, is_object),
    ({"response_format": {"type": "json_schema", "value": NAMED}}, is_object),
    ({"response_format": {"type": "regex", "value": PATTERN}}, fits_pattern),
    ({"structured_outputs": {"json": SCHEMA}}, is_object),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_object),
    ({"structured_outputs": {"regex": PATTERN}}, fits_pattern),
    ({"structured_outputs": {"choice": CHOICES}}, is_choice),
    ({"structured_outputs": {"grammar": SUM}}, is_sum),
    ({"structured_outputs": {"grammar": GBNF}}, is_sum),
    ({"guided_json": SCHEMA}, is_object),
    ({"guided_regex": PATTERN}, fits_pattern),
    ({"guided_choice": CHOICES}, is_choice),
    ({"guided_grammar": SUM}, is_sum),
]


def streamed(answer: Any) -> str:
    text = ""
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


@pytest.mark.parametrize(
    ("field", "fits"), FIELDS, ids=lambda one: getattr(one, "__name__", str(one)[:60])
)
def test_openai_and_vllm_fields_hold_answers(live: Live, field: dict[str, Any], fits: Any) -> None:
    body = {"prompt": "The film was", "max_tokens": 90, "temperature": 0.7, "seed": 3, **field}
    plain = live.client.post("/v1/completions", json=body)
    assert plain.status_code == 200, plain.text
    (choice,) = plain.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert fits(choice["text"])
    again = live.client.post("/v1/completions", json={**body, "stream": True})
    assert streamed(again) == choice["text"]
    talk = {**body, "messages": [{"role": "user", "content": "The film was"}]}
    del talk["prompt"]
    chat = live.client.post("/v1/chat/completions", json=talk)
    assert chat.status_code == 200, chat.text
    assert fits(chat.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        ({"type": "json", "value": SCHEMA}, is_object),
        ({"type": "json", "value": json.dumps(SCHEMA)}, is_object),
        (
            {"type": "json", "value": {name: SCHEMA[name] for name in SCHEMA if name != "type"}},
            is_object,
        ),
        ({"type": "json_schema", "value": NAMED}, is_object),
        ({"type": "regex", "value": PATTERN}, fits_pattern),
    ],
)
def test_tgi_grammars_hold_answers(live: Live, grammar: dict[str, Any], fits: Any) -> None:
    parameters = {"max_new_tokens": 90, "details": True, "seed": 5, "temperature": 0.7}
    body = {"inputs": "The film was", "parameters": {**parameters, "grammar": grammar}}
    answer = live.client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    text = answer.json()["generated_text"]
    assert fits(text)
    assert answer.json()["details"]["finish_reason"] == "eos_token"
    lines = live.client.post("/generate_stream", json=body).text.splitlines()
    events = [json.loads(one.removeprefix("data:")) for one in lines if one.startswith("data:")]
    assert events[-1]["generated_text"] == text
    assert "".join(one["token"]["text"] for one in events if not one["token"]["special"]) == text


def test_any_object_and_no_format(live: Live) -> None:
    ways = ({"response_format": {"type": "json_object"}}, {"guided_json": {"type": "object"}})
    for field in (*ways, {"structured_outputs": {"json_object": True}}):
        body = {"prompt": "The film was", "max_tokens": 300, "seed": 4, "temperature": 1.5, **field}
        choice = live.client.post("/v1/completions", json=body).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert is_any_object(choice["text"])
        assert choice["text"].startswith("{")
    text = {"prompt": "The", "response_format": {"type": "text"}, "max_tokens": 3}
    assert live.client.post("/v1/completions", json=text).status_code == 200


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "(?=a)"}, "unsupported_grammar", "guided_regex"),
    ({"guided_json": {"not": {}}}, "unsupported_grammar", "guided_json"),
    ({"guided_json": {"$ref": "#"}}, "grammar_too_complex", "guided_json"),
    ({"guided_regex": "a" * 300_000}, "grammar_too_complex", "guided_regex"),
    ({"guided_grammar": 'start: "a" start'}, "grammar_too_complex", "guided_grammar"),
    (
        {"structured_outputs": {"json": {"type": "string", "minLength": 3, "maxLength": 2}}},
        "grammar_unreachable",
        "structured_outputs.json",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "invalid_request",
        "structured_outputs.choice",
    ),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "invalid_request", ""),
    ({"structured_outputs": {"regexp": "a"}}, "invalid_request", ""),
    ({"response_format": {"type": "structural_tag"}}, "unsupported_grammar", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "unsupported_grammar", "response_format"),
]


@pytest.mark.parametrize(("field", "code", "place"), BAD, ids=lambda one: str(one)[:40])
def test_bad_grammars_are_refused_with_what_was_expected(
    live: Live, field: dict[str, Any], code: str, place: str
) -> None:
    answer = live.client.post("/v1/completions", json={"prompt": "The", "max_tokens": 4, **field})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    if place:
        assert error["param"] == place
        assert "expected: " in error["message"]


def test_native_calls_refuse_with_422(live: Live) -> None:
    grammar = {"type": "json", "value": {"if": {}}}
    body = {"inputs": "The", "parameters": {"grammar": grammar}}
    answer = live.client.post("/generate", json=body)
    assert answer.status_code == 422
    problem = answer.json()
    assert (problem["code"], problem["field"]) == (
        "unsupported_grammar",
        "parameters.grammar.value",
    )
    assert {"found", "expected", "fix"} <= set(problem)


def test_a_crowd_with_and_without_grammars_survives_a_lost_worker_and_a_replacement(
    live: Live, tmp_path: Path
) -> None:
    names = sorted(one.name for one in ADAPTERS_DIR.iterdir() if "wiki" in one.name)
    source = ADAPTERS_DIR / names[0]

    def ask(at: int) -> tuple[int, Any]:
        held = {"guided_json": SCHEMA} if at % 2 else {}
        body = {"model": names[0], "prompt": "The", "max_tokens": 40, "seed": at, **held}
        answer = live.client.post("/v1/completions", json=body)
        return at, answer

    def check(answers: list[tuple[int, Any]]) -> int:
        good = 0
        for at, answer in answers:
            assert answer.status_code in {200, 503}, answer.text
            if answer.status_code == 200:
                good += 1
                choice = answer.json()["choices"][0]
                if at % 2 and choice["finish_reason"] == "stop":
                    assert is_object(choice["text"])
        return good

    with ThreadPoolExecutor(8) as pool:
        assert check(list(pool.map(ask, range(16)))) == 16
        running = [pool.submit(ask, at) for at in range(16)]
        archive = {"name": names[0], "source": str(source), "replace": True}
        live.client.post("/admin/adapters", json=archive, headers=live.admin)
        live.kill_engine()
        check([one.result() for one in running])
        live.wait_ready()
        assert check(list(pool.map(ask, range(16)))) == 16
    # The worker's figures reach /metrics a moment after the answers.
    until(lambda: live.metric('hira_grammars{kind="compiled"}') >= 1, every_s=0.1)
