"""Grammars checked in a process with bounds, before their requests take a place.

What a client sends is compiled and tried by ``server.inputs.grammar_program``, with limits on
memory and processor time. The worker compiles the same text again, off its engine thread, and by
then it is known to stay within them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from server.inputs.bounded_child import BoundedProcess
from server.inputs.text_errors import InputTooSlow, TextError
from server.messages import Grammar

PROGRAM_FILE: Final = Path(__file__).with_name("grammar_program.py")
GREETING_CPU_S: Final = 60.0  # for the vocabulary, which is the operator's own
ANSWER_FACTOR: Final = 12  # the most that a character takes in JSON twice over


class GrammarRefused(TextError):
    """A grammar that cannot be honoured."""

    code = "unsupported_grammar"


class GrammarTooComplex(GrammarRefused):
    """It takes more than a grammar may, or only an endless text fits it."""

    code = "grammar_too_complex"


class GrammarUnreachable(GrammarRefused):
    """No text that the base can write fits it."""

    code = "grammar_unreachable"


REFUSALS: Final = {one.code: one for one in (GrammarRefused, GrammarTooComplex, GrammarUnreachable)}


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one grammar may take.

    Args:
        cpu_s: Seconds of processor time to check it.
        text_bytes: Of the grammar as it is sent.
        memory_bytes: Address space of the process that checks, the vocabulary included.
    """

    cpu_s: float = 2.0
    text_bytes: int = 256 << 10
    memory_bytes: int = 1 << 30


class GrammarProcess:
    """One process that checks, for one vocabulary. Safe to share between threads, which take
    turns.

    Args:
        tokens: Says what each id of the base adds to a text; asked when a process is started.
        limits: Of one grammar.
    """

    def __init__(
        self, tokens: Callable[[], Sequence[bytes]], limits: GrammarLimits | None = None
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._tokens = tokens
        self._process = BoundedProcess(
            PROGRAM_FILE,
            memory_bytes=self.limits.memory_bytes,
            cpu_s=self.limits.cpu_s,
            answer_bytes=ANSWER_FACTOR * self.limits.text_bytes + (1 << 16),
            greeting=self._greeting,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, kind: str, content: Any, *, deadline: float | None = None) -> Grammar:
        """A grammar as the worker takes it.

        Args:
            kind: ``json_schema``, ``regex``, ``choice``, ``lark`` or ``tool_calls``.
            content: A schema as values or as JSON, a pattern, a list of texts, or Lark or GBNF; of
                calls of tools what ``server.inputs.tool_grammars.tool_lark`` takes.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            GrammarRefused: It cannot be honoured.
            InputTooSlow: The deadline passed.
        """
        request = {"kind": kind, "content": content, "cpu_s": self.limits.cpu_s}
        try:
            answer = self._process.ask(request, deadline)
        except RecursionError:
            answer = {"exceeded": "more nesting than it may have"}
        except TimeoutError:
            raise InputTooSlow(
                "The deadline passed while the grammar was checked.",
                fix="Send a smaller grammar, or allow more time.",
            ) from None
        if "text" in answer:
            text = str(answer["text"])
            return Grammar(text, hashlib.sha256(text.encode()).hexdigest())
        if "refused" in answer:
            told = dict(answer["refused"])
            raise REFUSALS[told.pop("code")](told.pop("message"), **told)
        raise GrammarTooComplex(
            "The grammar takes too much to compile.",
            found=str(answer["exceeded"])[:200],
            expected=f"one that compiles within {self.limits.cpu_s:g} s of processor time",
            fix="Make it smaller: fewer alternatives, lower counts of repetitions, less nesting.",
        )

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process.close()

    def _greeting(self) -> bytes:
        tokens = [one.hex() for one in self._tokens()]
        return json.dumps({"tokens": tokens, "cpu_s": GREETING_CPU_S}).encode()
