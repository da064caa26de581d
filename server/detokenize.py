"""Text of a growing sequence of tokens: nothing twice, no half characters, no stop strings.

A token's text depends on its neighbours (a leading space, a character spread over several byte
tokens), so each step decodes a small window with and without the new tokens and takes the
difference. Which token comes next is none of its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNDECODED = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt, so that the first new token knows what it follows
MAX_CONTEXT_TOKENS = 16  # when those start inside a character
CHARACTER_TOKENS = 3  # most tokens that an incomplete character can have
PENDING_TOKENS = 8  # more tokens without a complete character than this are not text


class Detokenizer:
    """The text that tokens add, one token at a time.

    Args:
        tokenizer: A transformers tokenizer; special tokens are left out of the text.
        prompt: The tokens before the first new one.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt[-CONTEXT_TOKENS:])
        while self._decode(context).startswith(UNDECODED) and len(context) < min(
            MAX_CONTEXT_TOKENS, len(prompt)
        ):
            context = list(prompt[-len(context) - 1 :])
        self._ids = context
        self._start = 0  # of the window
        self._read = len(context)  # tokens whose text is out
        self._before = self._decode(context)  # text of the window up to _read

    def push(self, token_id: int) -> str:
        """Add a token; returns the complete characters that are new, often none or one word."""
        self._ids.append(token_id)
        window = self._decode(self._ids[self._start :])
        if not window.endswith(UNDECODED):
            return self._emit(window, len(self._ids))
        if len(self._ids) - self._read > PENDING_TOKENS:
            # Bytes that are no text: only the last few can still become a character.
            upto = len(self._ids) - CHARACTER_TOKENS
            return self._emit(self._decode(self._ids[self._start : upto]), upto)
        return ""

    def flush(self) -> str:
        """The complete characters that are still held back; an incomplete one is left out."""
        window = self._decode(self._ids[self._start :]).rstrip(UNDECODED)
        return self._emit(window, len(self._ids))

    def _emit(self, window: str, upto: int) -> str:
        text = window[len(self._before) :]
        self._start, self._read = self._read, upto
        self._before = self._decode(self._ids[self._start : upto])
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Ends a text before the first stop string, holding back what could become one.

    Args:
        stops: The strings; empty ones are ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what surely comes before any stop string."""
        if not self._stops:
            return text
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            text, self._held = self._held[:at], ""
            return text
        keep = max(self._overlap(stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """The longest proper prefix of ``stop`` that the held text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """The text of one request: detokenized, ended by its stop strings.

    Args:
        tokenizer, prompt: As for ``Detokenizer``.
        stops: The request's stop strings. None of them appears in ``text``.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._parts: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    @property
    def text(self) -> str:
        """All that was released so far."""
        return "".join(self._parts)

    def push(self, token_id: int) -> tuple[str, str]:
        """Add a token.

        Returns:
            What it adds to the text as such, and what may be shown now: without stop strings, and
            without what could still become one.
        """
        added = self._detokenizer.push(token_id)
        return added, self._release(self._stops.push(added))

    def finish(self) -> str:
        """No more tokens come: what can be shown beyond what was shown. Nothing after a stop."""
        if self.stopped:
            return ""
        rest = self._stops.push(self._detokenizer.flush())
        return self._release(rest if self.stopped else rest + self._stops.flush())

    def _release(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token of a text spells; a special one is no part of the readable text."""

    text: str
    special: bool


def spell(tokenizer: Any, token_ids: Sequence[int]) -> list[Piece]:
    """The text of each token of a whole text.

    The texts of those that are not special join to the readable text, but for a character that the
    end leaves incomplete; one that several tokens spell is the text of the last of them. A special
    token has the vocabulary's name for it.
    """
    special = frozenset(tokenizer.all_special_ids)
    stream = Detokenizer(tokenizer, ())
    return [
        Piece(str(tokenizer.convert_ids_to_tokens(token)), special=True)
        if token in special
        else Piece(stream.push(token), special=False)
        for token in token_ids
    ]
