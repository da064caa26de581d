"""Calls of tools in texts: the same pieces however the text comes, and nothing lost."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest

from server.edge.endpoints.tool_calls import (
    FORMS,
    MARKERS,
    AnswerPart,
    CallBegun,
    MoreArguments,
    ToolCallReader,
    ToolForm,
    Words,
    form_of,
)

Read = tuple[str, list[tuple[str, str]]]  # words, then names with their arguments
NAMES = ("weather", "add")


def gathered(pieces: list[AnswerPart]) -> Read:
    words = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case Words(text):
                words += text
            case CallBegun(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case MoreArguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return words, calls


def read(form: ToolForm, text: str, cuts: list[int] | None = None) -> Read:
    reader = ToolCallReader(form, NAMES)
    bounds = [0, *(cuts or []), len(text)]
    pieces: list[AnswerPart] = []
    for start, stop in pairwise(bounds):
        pieces += reader.push(text[start:stop])
    return gathered(pieces + reader.finish())


def value(made: random.Random, depth: int = 0) -> Any:
    kind = made.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return made.choice(["", 'say "no"', "a\\b", "}{][", "é日\n😀", "<tool_call>", "name", "{"])
    if kind == 1:
        return made.choice([0, -3, 2.5, 1e9])
    if kind == 2:
        return made.choice([True, False, None])
    if kind in (3, 4):
        return made.choice(["paris", "a b"])
    if kind == 5:
        return [value(made, depth + 1) for _ in range(made.randrange(3))]
    return {made.choice(["name", "x", "arguments", "é"]): value(made, depth + 1) for _ in range(2)}


def calls_of(made: random.Random) -> list[tuple[str, str]]:
    found = []
    for _ in range(made.randint(1, 3)):
        arguments = {f"a{at}": value(made) for at in range(made.randrange(3))}
        spaced = made.choice([None, 1])
        ascii_only = made.random() < 0.5
        text = json.dumps(arguments, ensure_ascii=ascii_only, indent=spaced)
        found.append((made.choice(NAMES), text))
    return found


def written(form: ToolForm, calls: list[tuple[str, str]], words: str, made: random.Random) -> str:
    key = "parameters" if form == "llama3_json" else "arguments"
    space = made.choice(["", " ", "\n"])
    objects = []
    for name, arguments in calls:
        parts = [f'"name":{space}"{name}"', f'"{key}": {arguments}']
        if made.random() < 0.2:
            parts.reverse()
        if made.random() < 0.3:
            parts.append(f'"id":{space}"abcdef123"')
        objects.append("{" + f",{space}".join(parts) + space + "}")
    begin, end = MARKERS[form]
    if form == "hermes":
        between = made.choice(["", "\n"])
        return words + between.join(f"{begin}\n{one}\n{end}" for one in objects)
    if form == "llama3_json":
        return made.choice(["", begin]) + made.choice(["; ", ";", "\n"]).join(objects)
    if made.random() < 0.5:
        return words + f"{begin}{space}[" + f",{space}".join(objects) + "]"
    return words + "".join(f"{begin}{name}{space}{args}" for name, args in calls)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(60))
def test_calls_are_read_however_the_text_is_cut(form: ToolForm, seed: int) -> None:
    made = random.Random(seed)
    calls = calls_of(made)
    words = "" if form == "llama3_json" else made.choice(["", "I look.", "a < b [x] <tool"])
    text = written(form, calls, words, made)
    assert read(form, text) == (words, calls), text
    assert read(form, text, list(range(1, len(text)))) == (words, calls), text
    cuts = sorted(made.sample(range(len(text)), 5))
    assert read(form, text, cuts) == (words, calls), text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just words.",
        " with space around \n",
        "a <tool_cal b [TOOL_CALL] <|python_tag",
        '{"answer": 42}',
        '{"name": "nobody", "parameters": {}}',
        '["a", 1]',
        "{",
        "<",
    ],
)
def test_what_is_no_call_is_text(form: ToolForm, text: str) -> None:
    for cuts in (None, list(range(1, len(text)))):
        assert read(form, text, cuts) == (text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>what?</tool_call> yes"),
        ("hermes", '<tool_call>{"nam": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name" "x"}'),
        ("hermes", "so <tool_call>\n"),
        ("mistral", "[TOOL_CALLS] [1, 2]"),
        ("mistral", '[TOOL_CALLS] [{"arguments": {}}]'),
        ("llama3_json", '{"name": "other", "parameters": {"a": 1}} and more'),
        ("llama3_json", '<|python_tag|>print("hello")'),
    ],
)
def test_a_call_that_is_none_is_given_back(form: ToolForm, text: str) -> None:
    for cuts in (None, list(range(1, len(text)))):
        words, calls = read(form, text, cuts)
        assert (words.split(), calls) == (text.split(), [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(10))
def test_an_answer_that_is_cut_tells_the_same_however_it_came(form: ToolForm, seed: int) -> None:
    made = random.Random(1000 + seed)
    text = written(form, calls_of(made), "" if form == "llama3_json" else "I look.", made)
    for stop in made.sample(range(len(text)), min(30, len(text))):
        part = text[:stop]
        assert read(form, part, list(range(1, stop))) == read(form, part), part


def test_a_call_that_is_cut_keeps_what_came() -> None:
    whole = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "b"]}}'
    at = whole.index('"b"')
    assert read("hermes", whole[:at]) == ("", [("add", '{"a": [1, ')])
    assert read("hermes", whole[: whole.index("add")]) == (whole[: whole.index("add")], [])
    assert read("mistral", '[TOOL_CALLS]add{"a": 1') == ("", [("add", '{"a": 1')])
    assert read("llama3_json", '{"name": "add", "parameters": {"a"') == ("", [("add", '{"a"')])


def test_arguments_written_as_a_string_are_what_the_string_says() -> None:
    text = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    for cuts in (None, list(range(1, len(text)))):
        assert read("hermes", text, cuts) == ("", [("add", '{"a": 1}')])


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert read("hermes", '<tool_call>{"name": "add"}</tool_call>') == ("", [("add", "{}")])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}',
         "llama3_json"),
        ("{{ tools | tojson }}", None),
    ],
)  # fmt: skip
def test_the_form_is_that_of_the_template(template: str, form: str | None) -> None:
    assert form_of(template) == form
