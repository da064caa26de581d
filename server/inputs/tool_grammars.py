"""Grammars of answers that call tools: each call as the template shows it, its arguments by a
schema.

What stands around the arguments comes from the side that reads calls; here it becomes one grammar.
A mark that is a special token of the base has no text in it, and is asked for by its id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from server.inputs.schema_rules import DECIDED, SchemaFault, checked_schema

_ANY: Final = r"/(.|\n)*/"
_NO_OBJECT: Final = r"/[^{](.|\n)*/"
NO_ARGUMENTS: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


def arguments_schema(name: str, parameters: Any) -> Any:
    """The schema of a tool's arguments, which are an object; none at all without one.

    Raises:
        SchemaFault: It cannot be kept; what is found begins with the tool's name.
    """
    if parameters is None:
        return NO_ARGUMENTS
    try:
        checked = checked_schema(parameters)
    except SchemaFault as fault:
        raise of_tool(name, fault) from None
    if not isinstance(checked, dict) or checked.get("type", "object") != "object":
        found = json.dumps(checked)[:80]
        raise of_tool(
            name,
            SchemaFault(
                "unsupported_grammar",
                "The arguments of a tool are an object.",
                f"parameters {found}",
                'parameters of {"type": "object"}',
                "Make the value a property of an object.",
            ),
        )
    return checked if DECIDED & checked.keys() else {"type": "object", **checked}


def of_tool(name: str, fault: SchemaFault) -> SchemaFault:
    """A fault that says whose it is."""
    return SchemaFault(**{**fault.told, "found": f"tool {name}: {fault.told['found']}"[:200]})


def tool_lark(
    content: Mapping[str, Any], silent: Collection[int], json_lark: Callable[[Any], str]
) -> str:
    """The grammar in Lark.

    Args:
        content: ``calls``, each with ``before``, ``schema`` and ``after``; ``begin``, ``between``
            and ``end`` of all of them; ``marker``, which begins the first of them or each;
            ``several``; ``words``: whether the answer may as well be, or hold, other text;
            ``tokens``: ids of marks, by their text. Marks and what stands around are lists of
            texts.
        silent: Ids of the base that add nothing to a text.
        json_lark: A schema as a part of a rule.
    """
    tokens = {text: at for text, at in content["tokens"].items() if at in silent}

    def spelled(texts: Sequence[str]) -> str:
        return " ".join(f"<[{tokens[one]}]>" if one in tokens else _quoted(one) for one in texts)

    rules = []
    for at, call in enumerate(content["calls"]):
        rules.append(f"call_{at}: {spelled(call['before'])} args_{at} {spelled(call['after'])}")
        rules.append(f"args_{at}: {json_lark(call['schema'])}")
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(content["calls"]))))
    begin, between, end = (spelled(content[one]) for one in ("begin", "between", "end"))
    marker = content["marker"]
    more = f" ({between} call)*" if content["several"] else ""
    if not content["words"]:
        # Of marks before each call ``between`` has the next one's.
        rules.insert(0, f"start: {spelled(marker)} {begin} call{more} {end}".rstrip())
        return "\n".join(rules)
    if not marker:
        rules.insert(0, f"start: {begin} call{more} {end} | PLAIN | ")
        return "\n".join([*rules, f"PLAIN: {_NO_OBJECT}"])
    (mark,) = marker
    if mark in tokens:
        head = f"TEXT {spelled(marker)}"
    else:
        head = "before"
        rules.append(f"before[suffix={_quoted(mark)}]: {_ANY}")
    listed = f" ({between} call)*" if content["listed"] and content["several"] else ""
    many = "*" if content["several"] else "?"
    rules.insert(0, f"start: ({head} {begin} call{listed} {end}){many} TEXT")
    return "\n".join([*rules, f"TEXT: {_ANY}"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
