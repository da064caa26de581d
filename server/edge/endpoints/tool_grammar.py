"""Answers that must call tools, or whose calls must keep schemas, as a grammar to hold them to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from server.edge.endpoints.openai_format import ToolReading
from server.edge.endpoints.schemas_conversation import NamedTool, Tool, ToolChoice
from server.edge.endpoints.structured import ANY_OBJECT, AskedGrammar
from server.edge.endpoints.tool_calls import MARKERS
from server.errors import Refusal

_CALL_ID: Final = "000000000"  # templates of Mistral's take ids of nine characters


def asked_of_tools(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    reading: ToolReading | None,
    id_of: Callable[[str], int | None],
    other: AskedGrammar | None,
) -> AskedGrammar | None:
    """What an answer is held to.

    Args:
        tools: Of the request.
        choice: Which of them it is to call.
        reading: How calls are written; None: none are read.
        id_of: The id of a mark that is one token of the base.
        other: What the request asks for beside tools.

    Returns:
        A grammar of calls where a call is required or a tool is strict, else ``other``.

    Raises:
        Refusal: Both are asked for.
    """
    forced = choice == "required" or isinstance(choice, NamedTool)
    if reading is None or not (forced or any(one.function.strict for one in tools)):
        return other
    if other is not None:
        raise Refusal.because(
            "invalid_request",
            "An answer can be held to one grammar.",
            found=f"{other.field} and {'tool_choice' if forced else 'a strict tool'}",
            expected="one of them",
            field=other.field,
        )
    if isinstance(choice, NamedTool):
        tools = [one for one in tools if one.function.name == choice.function.name]
    content = {
        **_surroundings(reading),
        "calls": [_call(one, reading, held=forced) for one in tools],
        # Templates of the form without marks write one call alone.
        "several": reading.several
        and not isinstance(choice, NamedTool)
        and reading.form != "llama3_json",
        "words": not forced,
        "tokens": {
            mark: at
            for mark in (*MARKERS[reading.form], *reading.marks)
            if mark and (at := id_of(mark)) is not None
        },
    }
    return AskedGrammar("tool_calls", content, "tools")


def _surroundings(reading: ToolReading) -> Mapping[str, Any]:
    """What stands before, between and after the calls of an answer."""
    mark, _ = MARKERS[reading.form]
    parts: dict[str, Any] = {"marker": [mark], "begin": [], "between": [mark], "end": []}
    if reading.form == "llama3_json":
        return {**parts, "marker": [], "between": [], "listed": False}
    if reading.form == "hermes":
        return {**parts, "between": ["\n", mark], "listed": False}
    if reading.marks:
        return {**parts, "listed": False}
    return {**parts, "begin": [" ["], "between": [", "], "end": ["]"], "listed": True}


def _call(tool: Tool, reading: ToolReading, *, held: bool) -> dict[str, Any]:
    """One call of one tool, around its arguments."""
    function = tool.function
    name = json.dumps(function.name)
    if reading.form == "hermes":
        _, end = MARKERS["hermes"]
        before, after = [f'\n{{"name": {name}, "arguments": '], [f"}}\n{end}"]
    elif reading.marks:
        given = [_CALL_ID] if reading.marks[0] != "[ARGS]" else []
        before, after = [function.name], []
        for mark in reading.marks:
            before += [mark, *(given if mark != "[ARGS]" else [])]
    else:
        word = "parameters" if reading.form == "llama3_json" else "arguments"
        before, after = [f'{{"name": {name}, "{word}": '], ["}"]
    keeps = held or bool(function.strict)
    schema = function.parameters if keeps else ANY_OBJECT
    return {"name": function.name, "before": before, "schema": schema, "after": after}
