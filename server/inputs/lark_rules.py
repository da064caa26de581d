"""What of a grammar in Lark is taken, and grammars that only an endless text fits.

Taken are rules and terminals of texts, patterns, groups, alternatives and repetitions, with
``%import common.X`` and ``%ignore``. The engine knows more, such as settings of a rule or ids of
tokens, which it would leave out in silence or which would reach past the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from server.inputs.schema_rules import SchemaFault

DEPTH_MAX: Final = 64
_TOKEN: Final = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|\#[^\n]*)
    |(?P<directive>%[ \t]*(?:import|ignore)[^\n]*)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?)
    |(?P<pattern>/(?:\\.|[^/\\\n])+/[imslux]*)
    |(?P<name>[?!]?[A-Za-z_][A-Za-z0-9_-]*)
    |(?P<count>\{\s*(?P<least>\d*)\s*(?:,\s*\d*\s*)?\}|~\s*(?P<from>\d+)(?:\s*\.\.\s*\d+)?)
    |(?P<alias>->\s*[A-Za-z_]\w*)
    |(?P<priority>\.-?\d+)
    |(?P<range>\.\.)
    |(?P<mark>[:|()\[\]*+?&~])""",
    re.VERBOSE,
)


def check_lark(text: str) -> None:
    """Raises SchemaFault for what is not taken, too deep, or without an end."""
    tokens = _tokens(text)
    rules = _Rules(tokens).read()
    if "start" not in rules:
        raise _not_taken("The grammar has no rule called start.", "no start", "a rule start")
    ending: set[str] = set()
    changed = True
    while changed:
        found = {name for name, body in rules.items() if _can_end(body, ending, rules)}
        changed = found != ending
        ending = found
    if "start" not in ending:
        raise SchemaFault(
            "grammar_too_complex",
            "Only an endless text fits the grammar.",
            "a recursion that every text has to follow",
            "an alternative of start that ends",
            "Give each rule that recurs an alternative without itself.",
        )


def _not_taken(message: str, found: str, expected: str) -> SchemaFault:
    return SchemaFault(
        "unsupported_grammar", message, found[:120], expected, "Write it in rules and terminals."
    )


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            line = text.count("\n", 0, at) + 1
            raise _not_taken(
                "The grammar has something that is not taken.",
                f"{text[at : at + 20]!r} in line {line}",
                "rules, terminals, texts, patterns, %import and %ignore",
            )
        kind = str(match.lastgroup)
        if kind in {"least", "from"} or match["count"]:
            least = match["least"] or match["from"] or "0"
            found.append(("count", least))
        elif kind not in {"skip", "directive", "alias", "priority"}:
            found.append((kind, match.group()))
        at = match.end()
    return found


@dataclass(slots=True)
class _Node:
    """A part of a body: it ends if any of its alternatives does, each of which is a row of parts;
    ``optional`` ones in every case. ``name`` refers to a rule."""

    rows: list[list[_Node]] = field(default_factory=list)
    name: str | None = None
    optional: bool = False


def _can_end(node: _Node, ending: set[str], rules: dict[str, _Node]) -> bool:
    if node.optional:
        return True
    if node.name is not None:
        return node.name in ending or node.name not in rules  # imported ones end
    return any(all(_can_end(one, ending, rules) for one in row) for row in node.rows)


class _Rules:
    """Reads the rules of a grammar."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0

    def read(self) -> dict[str, _Node]:
        rules: dict[str, _Node] = {}
        while self._at < len(self._tokens):
            kind, name = self._tokens[self._at]
            if kind != "name" or not self._begins_rule(self._at):
                raise _not_taken("A rule is not well-formed.", name, "NAME: and what it is made of")
            self._at += 2
            rules[name.lstrip("?!")] = self._alternatives(0)
        return rules

    def _begins_rule(self, at: int) -> bool:
        after: Any = self._tokens[at + 1] if at + 1 < len(self._tokens) else None
        return self._tokens[at][0] == "name" and after == ("mark", ":")

    def _alternatives(self, depth: int) -> _Node:
        if depth > DEPTH_MAX:
            raise SchemaFault(
                "grammar_too_complex",
                "The grammar is nested too deeply.",
                f"more than {DEPTH_MAX} groups within each other",
                f"at most {DEPTH_MAX}",
                "Make rules of them.",
            )
        node = _Node(rows=[[]])
        while self._at < len(self._tokens):
            kind, text = self._tokens[self._at]
            if kind == "name" and self._begins_rule(self._at):
                break
            if kind == "mark" and text in ")]":
                break
            self._at += 1
            if kind in {"text", "pattern"}:
                node.rows[-1].append(_Node(rows=[[]]))
            elif kind == "name":
                node.rows[-1].append(_Node(name=text.lstrip("?!")))
            elif text == "|":
                node.rows.append([])
            elif text in {"(", "["}:
                inner = self._alternatives(depth + 1)
                inner = _Node(rows=[[inner]], optional=text == "[")
                if self._at >= len(self._tokens):
                    raise _not_taken("A group is not closed.", text, "its other half")
                self._at += 1
                node.rows[-1].append(inner)
            elif text in {"*", "?"} or (kind == "count" and int(text) == 0):
                self._last(node, text).optional = True
            elif text == "+" or kind == "count":
                self._last(node, text)
            elif text not in {"&", "~", ".."}:
                raise _not_taken(
                    "The grammar has something that is not taken.", text, "a rule's parts"
                )
        return node

    def _last(self, node: _Node, sign: str) -> _Node:
        if not node.rows[-1]:
            raise _not_taken("A repetition follows nothing.", sign, "what is repeated before it")
        node.rows[-1][-1] = _Node(rows=[[node.rows[-1][-1]]])
        return node.rows[-1][-1]
