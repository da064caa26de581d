"""The library that keeps answers to a grammar, llguidance: the one place that imports it.

The server's side of it is a vocabulary, which is made once, and matchers, one for each answer. The
end of an answer is not one of the base's tokens here but an id of its own behind them: it is
allowed where a text is complete, and which real tokens end an answer is left to the lane.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal

import llguidance
import llguidance.numpy
import numpy as np
import numpy.typing as npt

GrammarKind = Literal["json_schema", "regex", "choice", "lark", "tool_calls"]
# Between the marks of JSON: a space, or a new line that is indented. Without a bound an answer may
# be spaces for ever, and small models like that.
WHITESPACE: Final = r"( |\r?\n[ \t]{0,24})"
# Every token that fits may come, not only the one by which the library would write what is certain.
_OPTIONS: Final = '%llguidance {"no_forcing": true}'
NO_OPTIONS: Final = "%llguidance {}"  # what a translation from GBNF begins with
_END: Final = b"<end>"


class _Tokens:
    """A vocabulary as the library asks for it."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, _END]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        return []  # of use only to write ahead what is certain, which ``_OPTIONS`` turn off


class Vocabulary:
    """The tokens of a base, made ready for grammars.

    Args:
        tokens: What each id adds to a text; empty for what no text has.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.size = len(tokens)
        self.end = self.size  # stands for every token that ends an answer
        self.silent = frozenset(at for at, one in enumerate(tokens) if not one)
        wrapped = llguidance.TokenizerWrapper(_Tokens(tokens))
        self.engine = llguidance.LLTokenizer(wrapped, n_vocab=self.size + 1)
        singles = {one[0] for one in tokens if len(one) == 1}
        # Of UTF-8; without one of them there are texts that no tokens spell.
        self.spells_everything = singles.issuperset(
            {*range(0x20, 0x7F), 9, 10, 13, *range(0x80, 0xC0), *range(0xC2, 0xF5)}
        )

    def limits(self) -> llguidance.LLParserLimits:
        """What one grammar may take: about 20 ms for a mask, and 20 MB of states."""
        return llguidance.LLParserLimits(
            step_lexer_fuel=200_000,
            step_max_items=30_000,
            max_lexer_states=10_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )

    def matcher(self, text: str) -> llguidance.LLMatcher:
        """A matcher at the start of an answer; one that has an error says so, and never raises.

        Args:
            text: As ``engine_text`` makes it.
        """
        return llguidance.LLMatcher(self.engine, text, log_level=0, limits=self.limits())


class Masks:
    """Works out what may come next for many matchers at once, without Python's lock.

    Args:
        vocabulary: Of all of them.
        threads: That share the matchers of a call; they have the priority of the thread that makes
            this.
    """

    def __init__(self, vocabulary: Vocabulary, threads: int) -> None:
        self._executor = llguidance.LLExecutor(threads)
        self._ids = vocabulary.size + 1
        # The library keeps Python's lock where a call has one matcher alone. A copy of this goes
        # beside it: it has an error, and does nothing with what it is told.
        self._beside = (vocabulary.matcher("beside"), vocabulary.end)

    def take(self, tokens: Sequence[tuple[Any, int]]) -> None:
        """Tell each matcher its token; one that does not fit leaves the matcher with an error.

        Args:
            tokens: Matchers, none of them twice, with the id of a token each.
        """
        told = list(tokens)
        if len(told) == 1:
            matcher, end = self._beside
            told.append((matcher.deep_copy(), end))
        llguidance.numpy.consume_token_par(self._executor, told)

    def __call__(self, matchers: Sequence[Any]) -> npt.NDArray[np.uint8]:
        """What may come next in each; of one that has an error only its end.

        Args:
            matchers: At least one, and none of them twice; nobody else uses them meanwhile.

        Returns:
            ``[len(matchers), bytes]``: a bit for each id and one for the end, the lowest of a byte
            first; the rest of the last bytes is 0.
        """
        shape = llguidance.numpy.get_bitmask_shape(len(matchers), self._ids)
        found = np.zeros(shape, np.int32)
        rows = [(one, at) for at, one in enumerate(matchers)]
        llguidance.numpy.fill_next_token_bitmask_par(self._executor, rows, found)
        return found.view(np.uint8)


def engine_text(kind: GrammarKind, content: Any) -> str:
    """A grammar in the library's own words.

    Args:
        kind: Which content it is.
        content: A schema as values, a list of texts, or a text; of calls of tools it is made by
            ``server.inputs.tool_grammars``.

    Raises:
        ValueError: It is not what the kind says, or in no notation that is known.
    """
    if kind == "json_schema":
        lark = f"start: {json_lark(content)}"
    elif kind == "regex":
        made = json.loads(llguidance.LLMatcher.grammar_from_regex(content))
        lark = str(made["grammars"][0]["lark_grammar"])
    elif kind == "choice":
        texts = (json.dumps(one, ensure_ascii=False) for one in content)
        lark = "start: " + " | ".join(texts)
    else:
        lark = content.removeprefix(NO_OPTIONS)
    return str(llguidance.grammar_from("lark", f"{_OPTIONS}\n{lark}"))


def json_lark(schema: Any) -> str:
    """What a schema allows, as a part of a rule in Lark."""
    kept = {"allOf": [schema]} if isinstance(schema, bool) else dict(schema)
    kept["x-guidance"] = {
        "whitespace_pattern": WHITESPACE,
        "lenient": False,  # what is not known is refused
        "coerce_one_of": False,
    }
    return f"%json {json.dumps(kept)}"


def as_lark(text: str) -> str:
    """A grammar in Lark, from Lark or from GBNF.

    Raises:
        ValueError: It is GBNF and not well-formed.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # noqa: BLE001  # whatever its parser meets
        raise ValueError(f"no GBNF: {error}") from None
