"""Text of a growing sequence of tokens: nothing twice, no half characters, no stop strings.

A token's text depends on its neighbours (a leading space, a character spread over several byte
tokens), so each step decodes a small window with and without the new tokens and takes the
difference. The whole is what the tokenizer's own ``decode`` makes of the whole, special tokens left
out and spaces left as they are, but for a character that the end leaves incomplete. Which token
comes next is none of its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self
from weakref import WeakKeyDictionary

from server.messages import Alternative, Likeliest

UNDECODED = "\ufffd"
PROMPT_TAIL_TOKENS = 6  # of the prompt, so that the first new token knows what it follows
MAX_CONTEXT_TOKENS = 16  # when those start inside a character
CHARACTER_TOKENS = 3  # most tokens that an incomplete character can have
PENDING_TOKENS = 8  # more tokens without a complete character than this are not text


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a vocabulary says of single ids.

    Args:
        special: Those that ``decode`` leaves out.
        bytes_of: Those that stand for one byte, where the tokenizer joins such to characters
            (``<0xE2>``). A byte that does not fit makes all that touch it undecodable, earlier
            ones too.
    """

    special: frozenset[int]
    bytes_of: dict[int, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Read a fast tokenizer of transformers."""
        backend = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        special = frozenset(token for token, one in added.items() if one.special)
        joins = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()
        bytes_of = {}
        for byte in range(256 if joins else 0):
            token = backend.token_to_id(f"<0x{byte:02X}>")
            if token is not None:
                bytes_of[token] = byte
        return cls(special, bytes_of)


_SPELLINGS: WeakKeyDictionary[Any, Spelling] = WeakKeyDictionary()


def spelling_of(tokenizer: Any) -> Spelling:
    """`Spelling.of`, read once for each tokenizer."""
    found = _SPELLINGS.get(tokenizer)
    if found is None:
        found = _SPELLINGS[tokenizer] = Spelling.of(tokenizer)
    return found


class Detokenizer:
    """The text that tokens add, one token at a time.

    Args:
        tokenizer: A fast tokenizer of transformers; special tokens are left out of the text.
        prompt: The tokens before the first new one.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._spelling = spelling_of(tokenizer)
        # The window: its first tokens are there so that the others know what they follow.
        self._ids = self._context(prompt)
        self._read = len(self._ids)  # tokens of the window whose text is out
        self._shown = self._decode(self._ids)  # text of the window that is out
        self._held = ""  # of tokens before the window: bytes that are no text, in case text follows

    def push(self, token_id: int) -> str:
        """Add a token; returns the complete characters that are new, often none or one word."""
        if self.is_silent(token_id):
            return ""  # not even as a neighbour
        self._ids.append(token_id)
        if token_id in self._spelling.bytes_of:
            return ""  # until something else ends the bytes: the next one may spoil them all
        return self.settle()

    def settle(self) -> str:
        """The complete characters that are new, now that no byte follows the last token."""
        window = self._decode(self._ids)
        text = self._emit(window)
        if not window.endswith(UNDECODED):
            self._advance()
        elif len(self._ids) - self._read > PENDING_TOKENS:
            self._let_go(window)
        return text

    def flush(self) -> str:
        """The complete characters that are still held back; an incomplete one is left out."""
        return self._emit(self._decode(self._ids[: len(self._ids) - self._incomplete_bytes()]))

    def peek(self, token_id: int) -> str:
        """What `push` would return; changes nothing."""
        if self.is_silent(token_id) or token_id in self._spelling.bytes_of:
            return ""
        _, text = self._new(self._decode([*self._ids, token_id]))
        return self._held + text if text else ""

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, as far as it can change what follows."""
        start, visible = len(prompt), 0
        most = PROMPT_TAIL_TOKENS
        found: list[int] = []
        while start > 0:
            start -= 1
            if self.is_silent(prompt[start]):
                continue
            found.insert(0, prompt[start])
            visible += 1
            if visible < most or found[0] in self._spelling.bytes_of:
                continue
            text = self._decode(found)
            if text and not (text.startswith(UNDECODED) and visible < MAX_CONTEXT_TOKENS):
                break
        return found

    def _emit(self, window: str) -> str:
        """What is new in the window's text, without the bytes at its end that are no character."""
        self._shown, text = self._new(window)
        if not text:
            return ""
        self._shown += text
        text, self._held = self._held + text, ""
        return text

    def _new(self, window: str) -> tuple[str, str]:
        """How much of the window's text is out, and what is new behind it."""
        shown = self._shown
        if not window.startswith(shown):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(shown, window, strict=False))
            shown = "".join(character for character, _ in same)
        return shown, window.rstrip(UNDECODED)[len(shown) :]

    def _advance(self) -> None:
        """Let the window begin with what is new, if that has a text for others to follow."""
        text = self._decode(self._ids[self._read :])
        if text:
            self._ids = self._ids[self._read :]
            self._shown = text
        self._read = len(self._ids)

    def _let_go(self, window: str) -> None:
        """Let the window begin behind bytes that are no text, whatever follows."""
        for count in range(1, CHARACTER_TOKENS + 1):
            before, after = self._ids[:-count], self._ids[-count:]
            text = self._decode(before)
            if text + self._decode(after) == window:
                self._held += text[len(self._shown) :]
                self._ids, self._read, self._shown = after, 0, ""
                return

    def _incomplete_bytes(self) -> int:
        """How many bytes at the end begin a character."""
        bytes_of = self._spelling.bytes_of
        run = 0
        while run < len(self._ids) and self._ids[-run - 1] in bytes_of:
            run += 1
        try:
            bytes(bytes_of[token] for token in self._ids[len(self._ids) - run :]).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return run - error.start
        return 0

    def is_silent(self, token_id: int) -> bool:
        """Whether ``decode`` leaves the token out: a special one, or none of the vocabulary."""
        return (
            token_id in self._spelling.special
            or self._tokenizer.convert_ids_to_tokens(token_id) is None
        )

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
        free_tokens: So many tokens at the start may spell them: no stop string begins there.
        shown: Special tokens that are text, too, as the vocabulary spells them.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        free_tokens: int = 0,
        shown: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._shown = {
            one: str(tokenizer.convert_ids_to_tokens(one))
            for one in shown
            if one in spelling_of(tokenizer).special
        }
        self._free_tokens = free_tokens
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
        if token_id in self._shown:
            added = self._detokenizer.settle() + self._shown[token_id]
        if self._free_tokens > 0:
            self._free_tokens -= 1
            return added, self._release(added)
        return added, self._release(self._stops.push(added))

    def peek(self, token_id: int) -> str:
        """What a token would add to the text as such; changes nothing."""
        if token_id in self._shown:
            return self._shown[token_id]
        return self._detokenizer.peek(token_id)

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
    alternatives: tuple[Alternative, ...] = ()


def spelled_apart(
    tokenizer: Any, token: tuple[int, str], others: Sequence[tuple[int, str]], likeliest: Likeliest
) -> tuple[Alternative, ...]:
    """Alternatives to a token, each with a text of its own.

    Args:
        tokenizer: Knows how the vocabulary spells them.
        token: Its id and its text.
        others: Ids and texts of the alternatives; the token itself may be among them.
        likeliest: Their log-probabilities, in the same order.
    """
    found, taken, special = [], {token[1], ""}, spelling_of(tokenizer).special
    for (other, text), (_, logprob) in zip(others, likeliest, strict=True):
        if other == token[0]:
            found.append(Alternative(other, token[1], logprob, other in special))
            continue
        spellings = (text, str(tokenizer.convert_ids_to_tokens(other)), f"token_id:{other}")
        own = next(one for one in (*spellings, text) if one not in taken or one == spellings[-1])
        taken.add(own)
        found.append(Alternative(other, own, logprob, other in special))
    return tuple(found)


def spell(
    tokenizer: Any, token_ids: Sequence[int], likeliest: Sequence[Likeliest] = ()
) -> list[Piece]:
    """The text of each token of a whole text, and of the likeliest in its place where those are
    given.

    The texts of those that are not special join to the readable text, but for a character that the
    end leaves incomplete; one that several tokens spell is the text of the last of them. A special
    token has the vocabulary's name for it.
    """
    spelling, stream = spelling_of(tokenizer), Detokenizer(tokenizer, ())
    texts: list[str] = []
    others: list[list[tuple[int, str]]] = []
    waiting: int | None = None  # the last byte of a run of them
    for at, token in enumerate(token_ids):
        if token in spelling.bytes_of:
            waiting = at
        elif waiting is not None and not stream.is_silent(token):
            texts[waiting] = stream.settle()
            waiting = None
        others.append([(one, stream.peek(one)) for one, _ in likeliest[at]] if likeliest else [])
        texts.append(
            str(tokenizer.convert_ids_to_tokens(token))
            if token in spelling.special
            else stream.push(token)
        )
    if waiting is not None:
        texts[waiting] = stream.flush()
    return [
        Piece(
            text,
            token in spelling.special,
            spelled_apart(tokenizer, (token, text), others[at], likeliest[at] if likeliest else ()),
        )
        for at, (token, text) in enumerate(zip(token_ids, texts, strict=True))
    ]
