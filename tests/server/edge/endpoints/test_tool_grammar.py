"""Grammars of calls of tools, in every form, and read back by what reads calls from answers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from server.edge.endpoints.openai_format import ToolReading
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.structured import AskedGrammar
from server.edge.endpoints.tool_calls import CallBegun, MoreArguments, Words
from server.edge.endpoints.tool_grammar import asked_of_tools
from server.errors import Refusal
from server.inputs.grammar_engine import Vocabulary
from server.inputs.grammar_program import Checker

IDS = {"[TOOL_CALLS]": 256, "[ARGS]": 257, "[CALL_ID]": 258}  # special: without bytes
TOKENS = [bytes([at]) for at in range(256)] + [b""] * len(IDS)
TEXTS = {at: text for text, at in IDS.items()}
SPACES = frozenset(b" \t\r\n")
KEPT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x"]}},
    "required": ["a"],
    "additionalProperties": False,
}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
MISTRAL = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]'
NAMED = '[TOOL_CALLS]add[ARGS]{"a": 1}'
WITH_ID = '[TOOL_CALLS]add[CALL_ID]000000000[ARGS]{"a": 1}'
LLAMA = '{"name": "add", "parameters": {"a": 1}}'
TWO = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "noted", "arguments": {}}]'
ADD: Any = {"type": "function", "function": {"name": "add"}}


def tool(name: str, schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def request(*tools: Any, **fields: Any) -> ChatRequest:
    made: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    return ChatRequest(**(made | fields))


def checked(body: ChatRequest, form: Any, marks: tuple[str, ...], *, special: bool) -> Any:
    several = body.parallel_tool_calls is not False
    reading = ToolReading(form, ("add", "noted"), several, marks)
    asked = asked_of_tools(
        body.tools or (), body.tool_choice, reading, IDS.get if special else lambda _: None, None
    )
    assert asked is not None
    checker = Checker()
    checker({"tokens": [one.hex() for one in TOKENS], "cpu_s": 1})
    return checker({"kind": asked.kind, "content": asked.content})


def ids_of(text: str, *, special: bool) -> list[int]:
    found: list[int] = []
    while text:
        mark = next((one for one in IDS if special and text.startswith(one)), text[0])
        found += [IDS[mark]] if mark in IDS else mark.encode()
        text = text[len(mark) :]
    return found


def fits(grammar: str, text: str, *, special: bool) -> bool:
    matcher = Vocabulary(TOKENS).matcher(grammar)
    ids = ids_of(text, special=special)
    return all(matcher.consume_token(one) for one in ids) and bool(matcher.is_accepting())


def swapped(call: str) -> str:
    return call.replace('"a"', '"c"')


FORCED: list[tuple[str, tuple[str, ...], dict[str, Any], list[str], list[str]]] = [
    ("hermes", (), {}, [HERMES, f"{HERMES}\n{HERMES}"], [swapped(HERMES), f"x{HERMES}", ""]),
    ("hermes", (), {"parallel_tool_calls": False}, [HERMES], [f"{HERMES}\n{HERMES}"]),
    ("hermes", (), {"tool_choice": ADD}, [HERMES],
     [HERMES.replace("add", "noted"), f"{HERMES}\n{HERMES}"]),
    ("mistral", (), {}, [MISTRAL, TWO], [swapped(MISTRAL), "x"]),
    ("mistral", (), {"parallel_tool_calls": False}, [MISTRAL], [TWO]),
    ("mistral", ("[ARGS]",), {}, [NAMED, NAMED + NAMED], [swapped(NAMED), MISTRAL]),
    ("mistral", ("[CALL_ID]", "[ARGS]"), {}, [WITH_ID], [NAMED]),
    ("llama3_json", (), {}, [LLAMA], [f"{LLAMA}; {LLAMA}", swapped(LLAMA), "x"]),
]  # fmt: skip


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("row", FORCED)
def test_a_forced_answer_is_calls_in_the_templates_form_that_keep_schemas(
    row: Any, special: bool
) -> None:
    form, marks, fields, good, bad = row
    body = request(tool("add", KEPT), tool("noted", None), **{"tool_choice": "required", **fields})
    grammar = checked(body, form, marks, special=special)["text"]
    assert [fits(grammar, one, special=special) for one in good] == [True] * len(good)
    assert [fits(grammar, one, special=special) for one in bad] == [False] * len(bad)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("form", "marks", "call"),
    [
        ("hermes", (), HERMES),
        ("mistral", (), MISTRAL),
        ("mistral", ("[ARGS]",), NAMED),
        ("llama3_json", (), LLAMA),
    ],
)
def test_a_strict_tool_keeps_its_schema_where_an_answer_may_be_text(
    form: str, marks: tuple[str, ...], call: str, special: bool
) -> None:
    body = request(tool("add", KEPT, strict=True), tool("noted", KEPT))
    grammar = checked(body, form, marks, special=special)["text"]
    loose = swapped(call.replace("add", "noted"))
    good = [call, loose, "just < text", ""]
    good += [f"Well. {call}"] if form != "llama3_json" else []
    assert [fits(grammar, one, special=special) for one in good] == [True] * len(good)
    assert not fits(grammar, swapped(call), special=special)
    assert not fits(grammar, call.replace("add", "other"), special=special)


@pytest.mark.parametrize(("form", "marks", "fields", "good", "bad"), FORCED)
def test_what_a_grammar_allows_is_read_as_calls(
    form: Any, marks: tuple[str, ...], fields: Any, good: Any, bad: Any
) -> None:
    body = request(tool("add", KEPT), tool("noted", None), **{"tool_choice": "required", **fields})
    several = body.parallel_tool_calls is not False
    reading = ToolReading(form, ("add", "noted"), several, marks)
    matcher = Vocabulary(TOKENS).matcher(checked(body, form, marks, special=True)["text"])
    for seed in range(8):
        draw, walker, text = random.Random(seed), matcher.deep_copy(), ""
        while not walker.is_accepting():
            mask = walker.compute_bitmask()
            allowed = [at for at in range(len(TOKENS)) if mask[at >> 3] >> (at & 7) & 1]
            # Spaces may go on for a while and are no part of what is asked here.
            token = draw.choice([one for one in allowed if one not in SPACES] or allowed)
            walker.consume_token(token)
            text += TEXTS.get(token) or TOKENS[token].decode()
        reader = reading.reader()
        parts = reading.given(reader.push(text) + reader.finish())
        assert not any(isinstance(one, Words) for one in parts), text
        names = [one.name for one in parts if isinstance(one, CallBegun)]
        assert names, text
        assert set(names) <= {"add", "noted"}
        for index, name in enumerate(names):
            mine = [one for one in parts if isinstance(one, MoreArguments) and one.index == index]
            value = json.loads("".join(one.text for one in mine))
            assert value == {} if name == "noted" else 0 <= value["a"] <= 9


@pytest.mark.parametrize(
    ("schema", "code", "found"),
    [
        ({"not": {}}, "unsupported_grammar", "tool bad: not at /not"),
        ({"type": "string"}, "unsupported_grammar", "tool bad: parameters"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "unsupported_grammar", "tool bad: "),
        (
            {"properties": {"a": {"enum": []}}, "required": ["a"]},
            "grammar_unreachable",
            "tool bad: ",
        ),
        (
            {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"},
            "grammar_too_complex",
            "tool bad: a recursion",
        ),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_tool(
    schema: Any, code: str, found: str
) -> None:
    body = request(tool("add", KEPT), tool("bad", schema), tool_choice="required")
    refused = checked(body, "hermes", (), special=True)["refused"]
    assert refused["code"] == code
    assert refused["found"].startswith(found)
    loose = request(tool("add", KEPT, strict=True), tool("bad", schema))
    assert "text" in checked(loose, "hermes", (), special=True)


def test_nothing_is_held_without_need_and_nothing_twice() -> None:
    reading = ToolReading("hermes", ("add",))
    other = AskedGrammar("json_schema", {}, "response_format")
    free = request(tool("add", KEPT))
    assert asked_of_tools(free.tools or (), free.tool_choice, reading, IDS.get, other) is other
    assert asked_of_tools(free.tools or (), free.tool_choice, reading, IDS.get, None) is None
    named = request(tool("add", KEPT), tool_choice=ADD)
    with pytest.raises(Refusal, match="one grammar"):
        asked_of_tools(named.tools or (), named.tool_choice, reading, IDS.get, other)
