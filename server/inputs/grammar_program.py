"""The program that tries grammars, in a process of its own with bounds on what it takes.

A grammar comes from a client and may be made to take all there is. Here it is read, held against
what the engine would leave out, compiled and asked for its first mask; ``server.inputs.grammars``
starts this program and speaks with it over pipes (``server.inputs.bounded_program``).

    first request      {"tokens": [bytes of each token in hexadecimal], "cpu_s"}
    request            {"kind", "content", "cpu_s"}
    answer             {"text"}: as the engine takes it; or {"refused": {code, message, found, ...}}
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from server.inputs.bounded_program import answer_requests
from server.inputs.grammar_engine import (
    NO_OPTIONS,
    GrammarKind,
    Vocabulary,
    as_lark,
    engine_text,
    json_lark,
)
from server.inputs.lark_rules import check_lark
from server.inputs.schema_rules import SchemaFault, checked_schema, of_object
from server.inputs.tool_grammars import arguments_schema, of_tool, tool_lark

CHECK_NICE: Final = 5  # whoever is served already comes first
WALKS: Final = 8  # through a grammar, where a vocabulary does not spell every text
WALK_TOKENS: Final = 48
_FOUND_CHARACTERS: Final = 200
# Words by which the engine says that a limit is met.
LIMITS: Final = ("limit", "too large", "too big", "too complex", "toocomplex", "fuel", "too deep")


class Checker:
    """Answers requests, each a grammar, for one vocabulary."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None

    def __call__(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if "tokens" in request:
            self._vocabulary = Vocabulary([bytes.fromhex(one) for one in request["tokens"]])
            return {}
        try:
            return {"text": self._checked(request["kind"], request["content"])}
        except SchemaFault as fault:
            return {"refused": fault.told}

    def _checked(self, kind: Any, content: Any) -> str:
        assert self._vocabulary is not None
        if kind == "tool_calls":
            return self._checked_calls(content)
        if kind == "json_schema":
            content = of_object(checked_schema(_read(content)))
        elif kind == "choice":
            content = list(dict.fromkeys(content))
        elif kind == "lark":
            try:
                content = as_lark(content)
            except ValueError as error:
                raise _not_honoured(str(error)) from None
            check_lark(content.removeprefix(NO_OPTIONS))
        return self._compiled(kind, content)

    def _checked_calls(self, content: Mapping[str, Any]) -> str:
        assert self._vocabulary is not None
        calls = [
            {**one, "schema": arguments_schema(one["name"], one["schema"])}
            for one in content["calls"]
        ]
        lark = tool_lark({**content, "calls": calls}, self._vocabulary.silent, json_lark)
        try:
            return self._compiled("lark", lark)
        except SchemaFault:
            for one in calls:  # whose fault it is
                try:
                    self._compiled("json_schema", one["schema"])
                except SchemaFault as fault:
                    raise of_tool(one["name"], fault) from None
            raise

    def _compiled(self, kind: GrammarKind, content: Any) -> str:
        """The text of a grammar that the engine takes and the vocabulary can write.

        Raises:
            SchemaFault: It is none.
        """
        assert self._vocabulary is not None
        try:
            text = engine_text(kind, content)
        except ValueError as error:
            raise _not_honoured(str(error)) from None
        matcher = self._vocabulary.matcher(text)
        _check(matcher)
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise _not_honoured(str(warnings[0]))
        if not self._allowed(matcher):
            raise _unreachable("not even a first token")
        if not self._vocabulary.spells_everything:
            for seed in range(WALKS):
                self._walk(matcher.deep_copy(), random.Random(seed))
        return text

    def _allowed(self, matcher: Any) -> list[int]:
        """Tokens that may come next; none where the text is complete and cannot go on.

        Raises:
            SchemaFault: No text fits, or a limit is met.
        """
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            _check(matcher)
        assert self._vocabulary is not None
        size = self._vocabulary.size
        found = [
            8 * at + bit
            for at, byte in enumerate(mask)
            if byte
            for bit in range(8)
            if byte >> bit & 1 and 8 * at + bit < size
        ]
        if not found and not matcher.is_accepting():
            raise _unreachable("a place where no token of the vocabulary can follow")
        return found

    def _walk(self, matcher: Any, choice: random.Random) -> None:
        """Follow the grammar at random for a while.

        Raises:
            SchemaFault: The vocabulary has no token to go on with.
        """
        for _ in range(WALK_TOKENS):
            found = self._allowed(matcher)
            if not found:
                return
            matcher.consume_token(choice.choice(found))
            _check(matcher)


def _read(content: Any) -> Any:
    """A schema that may have come as a text."""
    if not isinstance(content, str):
        return content
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _not_honoured(f"no JSON: {error}") from None


def _check(matcher: Any) -> None:
    if not matcher.is_error():
        return
    # Without the place, and without the lines of the grammar that follow: those are the client's.
    reason = " ".join(matcher.get_error().split()).split(" 1 | ")[0]
    reason = reason.removeprefix("at 2(8): ").removeprefix("failed to compile JSON schema: ")
    if "NoExtension" in reason or "nsatisfiable" in reason or "is empty" in reason:
        raise _unreachable(reason)
    if any(one in reason.lower() for one in LIMITS):
        raise SchemaFault(
            "grammar_too_complex",
            "The grammar takes too much.",
            reason[:_FOUND_CHARACTERS],
            "a grammar within the engine's limits",
            "Make it smaller: fewer alternatives, lower counts of repetitions, shorter patterns.",
        )
    raise _not_honoured(reason)


def _not_honoured(reason: str) -> SchemaFault:
    return SchemaFault(
        "unsupported_grammar",
        "The grammar cannot be honoured.",
        reason[:_FOUND_CHARACTERS],
        "what the documentation lists under structured output",
        "Leave out what is named, or reword it.",
    )


def _unreachable(reason: str) -> SchemaFault:
    return SchemaFault(
        "grammar_unreachable",
        "No text that this base can write fits the grammar.",
        reason[:_FOUND_CHARACTERS],
        "a grammar that some text of the base's vocabulary fits",
        "Look for parts that contradict each other, or characters that the base does not have.",
    )


if __name__ == "__main__":
    with suppress(OSError):
        os.nice(CHECK_NICE)
    answer_requests(Checker(), int(sys.argv[1]))
