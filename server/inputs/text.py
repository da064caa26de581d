"""Text to token ids and back: the one place that touches the tokenizer.

Used by the HTTP processes (encoding, chat templates) and by the worker (words of entities, filled
masks). It checks lengths and characters, so that no model ever sees a sequence it cannot hold; it
knows no model and runs none.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from adapters.tasks import BY_NAME, Cut, Task
from server.inputs.detokenize import Piece, spell
from server.inputs.text_errors import (
    InvalidInput,
    check_characters,
    check_unicode,
    input_too_long,
    lost_text,
    most_characters,
    no_room,
    too_many_tokens,
)
from server.inputs.token_bound import TokenBound
from server.inputs.tokenizer import load_tokenizer
from server.messages import Likeliest, TokenizedInput
from server.options import TokenizerSource

Side = Literal["left", "right"]
TextInput = str | tuple[str, str]  # a text, or a pair such as (question, context)

COUNTED_CHARACTERS: Final = 1 << 15  # longer texts are counted before their tokens are listed


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """One token of a text, and where it stands there, in characters.

    Args:
        text: That part of the text; of a token that was added to it, the vocabulary's spelling.
        special: Whether it was added.
        start, stop: None for one that was added.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Text:
    """A tokenizer with the limits of one base.

    Safe to share between threads: the Rust tokenizer keeps truncation as state, so calls take
    turns.

    Args:
        tokenizer: A fast tokenizer of transformers.
        max_tokens: The longest sequence, special tokens included.
        vocab_size: Rows of the base's embedding; ids at or above it are refused. None: no check.
        pad_id: The id that fills short rows. None: the tokenizer's own, else its end of sequence,
            else 0; the attention mask hides it from the backbone in every case.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocab_size = vocab_size
        candidates = (pad_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(
            one
            for one in candidates
            if one is not None and one >= 0 and (vocab_size is None or one < vocab_size)
        )
        self.note: str | None = None  # for the operator
        self._lock = threading.Lock()
        self._bound = TokenBound.of(getattr(tokenizer, "backend_tokenizer", None))

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        pad_id: int | None = None,
        source: TokenizerSource = "file",
    ) -> Text:
        """Load the tokenizer that lies beside a base.

        Args:
            folder: The base's folder.
            max_tokens: The base's context, or a smaller limit of the operator's.
            vocab_size: Rows of the base's embedding.
            pad_id: ``pad_token_id`` of the base's config, where it has one.
            source: As for `load_tokenizer`.

        Raises:
            TokenizerError: No tokenizer, only a slow one, or one that makes no tokens.
        """
        loaded = load_tokenizer(folder, source)
        made = cls(loaded.tokenizer, max_tokens=max_tokens, vocab_size=vocab_size, pad_id=pad_id)
        made.note = loaded.note
        return made

    @cached_property
    def apart(self) -> Text:
        """The same with a tokenizer and a lock of its own: what it does holds up nobody else.

        For long texts, whose thread keeps the lock for seconds.
        """
        twin = copy.copy(self)
        twin.tokenizer = copy.deepcopy(self.tokenizer)
        twin._lock = threading.Lock()
        return twin

    def limited(self, max_tokens: int) -> Text:
        """The same tokenizers, and their locks, with another limit."""
        apart = self.apart
        twin = copy.copy(self)
        twin.max_tokens = max_tokens
        twin.__dict__["apart"] = copy.copy(apart)
        twin.apart.max_tokens = max_tokens
        return twin

    @property
    def mask_id(self) -> int | None:
        """The id that a fill-mask input must contain, if this tokenizer has one."""
        mask: int | None = self.tokenizer.mask_token_id
        return mask

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def chat_template(self) -> str | None:
        """The base's own template for conversations without tools."""
        return self._template("default")

    @property
    def tool_template(self) -> str | None:
        """The base's own template for conversations with tools, or else for all."""
        return self._template("tool_use") or self.chat_template

    def _template(self, name: str) -> str | None:
        given = self.tokenizer.chat_template
        if not isinstance(given, Mapping):
            return given or None if name == "default" else None
        return given.get(name) or None

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The tokenizer's special tokens by name, as templates know them."""
        return dict(self.tokenizer.special_tokens_map)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None where the base has none."""
        with self._lock:
            found = self.tokenizer.convert_tokens_to_ids(token)
            spelled = None if found is None else self.tokenizer.convert_ids_to_tokens(found)
        if found is None or spelled != token or (self.vocab_size or 1 << 62) <= found:
            return None
        return int(found)

    def token_of(self, id_: int) -> str | None:
        """The token of an id as the vocabulary spells it; None where the base has no such id."""
        if not 0 <= id_ < min(self.vocab_size or 1 << 62, 1 << 31):
            return None
        with self._lock:
            found = self.tokenizer.convert_ids_to_tokens(id_)
        return None if found is None else str(found)

    def tokenize(
        self,
        texts: Sequence[TextInput],
        task: Task,
        *,
        truncation: bool = False,
        side: Side | None = None,
    ) -> tuple[TokenizedInput, ...]:
        """Token ids of the inputs of one request of the encode lane, special tokens included.

        Args:
            texts: One text, or pair of texts, per input. For question answering: (question,
                context).
            task: Decides whether text and offsets go along (those of the context for a pair) and
                whether a mask token is needed.
            truncation: Cut what is too long instead of refusing it. Which of a pair is cut, the
                task says.
            side: Where it is cut: at its end (``right``) or its start. None: as the tokenizer does.

        Raises:
            InputTooLong: An input is longer than ``max_tokens`` and ``truncation`` is off.
            InvalidInput: No tokens, no mask token for fill-mask, or a lone surrogate.
        """
        row = BY_NAME[task]
        found = []
        for index, one in enumerate(texts):
            first, second = one if isinstance(one, tuple) else (one, None)
            ids, offsets, type_ids = self._ids_of(
                first, second, row.cuts if truncation else None, side, index
            )
            self._check(ids, index)
            if row.needs_mask and self.mask_id not in ids:
                raise InvalidInput(
                    f"Input {index} has nothing to fill.",
                    found="no mask token",
                    expected=f"{self.tokenizer.mask_token or 'a base with a mask token'}",
                    fix="Put the mask token where a word is wanted, and keep it within the limit.",
                )
            found.append(
                TokenizedInput(
                    token_ids=tuple(ids),
                    text=(first if second is None else second) if row.spans else None,
                    offsets=tuple(offsets) if row.spans else None,
                    type_ids=tuple(type_ids) if type_ids is not None else None,
                )
            )
        return tuple(found)

    def tokenize_prompt(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 0,
        truncation: bool = False,
        special_tokens: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a prompt to be continued; an empty one becomes the start token.

        Args:
            prompt: The text.
            max_new_tokens: Room to leave behind the prompt.
            truncation: Cut the *start* of what is too long: the end is what is continued.
            special_tokens: Add those of the tokenizer's template. Off for a rendered chat.

        Raises:
            InputTooLong: Prompt and new tokens exceed ``max_tokens``.
            InvalidInput: An empty prompt without a start token, or a lone surrogate.
        """
        check_unicode(prompt, 0)
        room = self.max_tokens - max_new_tokens
        start_text = self.tokenizer.bos_token
        if not truncation:
            # One more: an end of sequence behind the text is left out.
            if self._surely_exceeds(prompt, room + 1, special_tokens=special_tokens):
                raise no_room(f"more than {room} prompt tokens", max_new_tokens, self.max_tokens)
        elif room >= 1 and not (start_text and prompt.lstrip().startswith(start_text)):
            prompt = self._bound.tail(prompt, room + 1)
        check_characters(prompt, 0, self.max_tokens)
        with self._lock:
            ids: list[int] = self.tokenizer(
                prompt, add_special_tokens=special_tokens, truncation=False, verbose=False
            )["input_ids"]
            lost = self._loses(prompt, ids)
        if lost:
            raise lost_text(0)
        start = self.tokenizer.bos_token_id
        ids = self._without_final_eos(prompt, ids)
        if not ids and start is not None:
            ids = [start]
        if truncation and len(ids) > room >= 1:
            keep_start = bool(start is not None and ids[0] == start and room > 1)
            ids = ids[:1] + ids[len(ids) - room + 1 :] if keep_start else ids[-room:]
        if len(ids) > room:
            raise no_room(f"{len(ids)} prompt tokens", max_new_tokens, self.max_tokens)
        self._check(ids, 0)
        return tuple(ids)

    def tokens(self, text: str, index: int = 0, *, special_tokens: bool = True) -> list[TokenPlace]:
        """The tokens of a text, with their places; none for one that has none.

        Args:
            text: Of at most ``max_tokens``.
            index: Of the text in its request, for an error.
            special_tokens: Add those of the tokenizer's template.

        Raises:
            InputTooLong: It has more tokens.
            InvalidInput: A lone surrogate.
        """
        check_unicode(text, index)
        if self._surely_exceeds(text, self.max_tokens, special_tokens=special_tokens):
            raise too_many_tokens(index, f"more than {self.max_tokens} tokens", self.max_tokens)
        with self._lock:
            encoding = self.tokenizer(
                text,
                add_special_tokens=special_tokens,
                truncation=False,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
            spelled = encoding.tokens(0)
        ids: list[int] = encoding["input_ids"]
        if len(ids) > self.max_tokens:
            raise too_many_tokens(index, f"{len(ids)} tokens", self.max_tokens)
        return [
            TokenPlace(id_, token, True, None, None)
            if special
            else TokenPlace(id_, text[start:stop], False, int(start), int(stop))
            for id_, token, special, (start, stop) in zip(
                ids,
                spelled,
                encoding["special_tokens_mask"],
                encoding["offset_mapping"],
                strict=True,
            )
        ]

    def spellings(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        with self._lock:
            found = self.tokenizer.convert_ids_to_tokens(list(token_ids))
        return ["" if one is None else str(one) for one in found]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The readable text of some ids."""
        with self._lock:
            text = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return str(text)

    def targets(self, words: Sequence[str | int]) -> tuple[int, ...]:
        """Token ids of words that a mask may be filled with, each once.

        Args:
            words: A token's id, its spelling in the vocabulary (``##ly``), or a text that is one
                token (`` film`` with its space for byte-level vocabularies).

        Raises:
            InvalidInput: A word that is no single token of the base.
        """
        found: dict[int, None] = {}
        for word in words:
            ids = [word] if isinstance(word, int) else self._ids_of_word(word)
            if len(ids) != 1 or not 0 <= ids[0] < (self.vocab_size or 1 << 62):
                raise InvalidInput(
                    "A target is no single token of the base.",
                    found=f"{str(word)[:60]!r}: "
                    + (f"{len(ids)} tokens" if len(ids) != 1 else f"token id {ids[0]}"),
                    expected="words that the vocabulary has as one token, or token ids",
                    fix="Leave it out, or mask and score its tokens one by one.",
                )
            found[ids[0]] = None
        return tuple(found)

    def word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words as a text has them: at its start, and behind a space; each once.

        Args:
            words: Any texts; one may be several tokens.

        Raises:
            InvalidInput: A word that the vocabulary cannot spell.
        """
        found: dict[tuple[int, ...], None] = {}
        unknown = self.tokenizer.unk_token_id
        for word in words:
            check_unicode(word, 0)
            for text in (word, " " + word.lstrip()):
                with self._lock:
                    ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                ids = tuple(self._without_final_eos(text, ids))
                if not ids or (unknown is not None and unknown in ids):
                    raise InvalidInput(
                        "The vocabulary cannot spell a word.",
                        found=repr(word[:60]),
                        expected="words in the script of the base",
                        fix="Leave it out: the base cannot say it either.",
                    )
                found[ids] = None
        return tuple(found)

    def _ids_of_word(self, word: str) -> list[int]:
        check_unicode(word, 0)
        with self._lock:
            known = self.tokenizer.get_vocab().get(word)
            if known is not None:
                return [int(known)]
            ids: list[int] = self.tokenizer(word, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        unknown = self.tokenizer.unk_token_id
        return [] if unknown is not None and unknown in ids else ids

    def spell(self, token_ids: Sequence[int], likeliest: Sequence[Likeliest] = ()) -> list[Piece]:
        """The text of each token, as ``server.inputs.detokenize.spell`` has it."""
        with self._lock:
            return spell(self.tokenizer, token_ids, likeliest)

    def piece(self, token_id: int, shown: str) -> str:
        """A token as the vocabulary spells it; ``shown``, its text, where it is an unknown one."""
        if token_id == self.tokenizer.unk_token_id:
            return shown
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def join(self, pieces: Sequence[str]) -> str:
        """Pieces joined to readable text as the tokenizer joins its own."""
        return str(self.tokenizer.convert_tokens_to_string(list(pieces)))

    def _ids_of(
        self, first: str, second: str | None, cuts: Cut | None, side: Side | None, index: int
    ) -> tuple[list[int], list[tuple[int, int]], list[int] | None]:
        for text in (first, second):
            if text is not None:
                check_unicode(text, index)
        side = side or self.tokenizer.truncation_side
        nearest = self._bound.tail if side == "left" else self._bound.head
        whole = len(first if second is None else second)  # of the text that offsets are of
        if cuts == "second" and second is not None and self._surely_exceeds(first, self.max_tokens):
            raise input_too_long(index, "a first text that fills the context", self.max_tokens)
        if cuts is not None:
            # Of two that are both too long, the longer one keeps the odd token: which it is, is
            # decided by all tokens of texts that are not huge.
            huge = COUNTED_CHARACTERS if cuts == "longest" and second is not None else 0
            if second is not None and len(second) > huge:
                second = nearest(second, self.max_tokens)
            if (second is None or cuts == "longest") and len(first) > huge:
                first = nearest(first, self.max_tokens)
        elif any(
            text is not None and self._surely_exceeds(text, self.max_tokens)
            for text in (first, second)
        ):
            raise input_too_long(index, f"more than {self.max_tokens} tokens", self.max_tokens)
        check_characters(first, index, self.max_tokens)
        check_characters(second or "", index, self.max_tokens)
        strategy: str | bool = cuts is not None
        if cuts == "second" and second is not None:
            # A limit that leaves no room for a token of the second text falls on the longer one.
            strategy = "only_second"
        with self._lock:
            usual = self.tokenizer.truncation_side
            self.tokenizer.truncation_side = side
            try:
                encoding = self.tokenizer(
                    first,
                    second,
                    truncation=strategy,
                    max_length=None if cuts is None else self.max_tokens,
                    return_offsets_mapping=True,
                    verbose=False,
                )
            except Exception as error:  # the Rust side raises bare exceptions
                if cuts is None or second is None:
                    raise
                raise input_too_long(
                    index, "a first text that fills the context", self.max_tokens
                ) from (error)
            finally:
                self.tokenizer.truncation_side = usual
            sequence_ids = encoding.sequence_ids(0)
        ids: list[int] = encoding["input_ids"]
        for number, text in enumerate((first, second)):
            if text and text.strip() and number not in sequence_ids and len(ids) < self.max_tokens:
                raise lost_text(index)
        if len(ids) > self.max_tokens:
            raise input_too_long(index, f"{len(ids)} tokens", self.max_tokens)
        wanted = 0 if second is None else 1
        left_out = whole - len(first if second is None else second) if side == "left" else 0
        offsets = [
            (int(start) + left_out, int(stop) + left_out) if sequence == wanted else (0, 0)
            for (start, stop), sequence in zip(
                encoding["offset_mapping"], sequence_ids, strict=True
            )
        ]
        type_ids = encoding.get("token_type_ids") if second is not None else None
        return ids, offsets, type_ids

    def _surely_exceeds(self, text: str, tokens: int, *, special_tokens: bool = True) -> bool:
        """Whether a text has more tokens than that: by what its length says, and for long ones by
        a count that makes no list of them. False for a short text says nothing."""
        if self._bound.exceeds(text, tokens):
            return True
        if len(text) <= COUNTED_CHARACTERS or len(text) > most_characters(self.max_tokens):
            return False
        backend = self.tokenizer.backend_tokenizer
        with self._lock:
            backend.no_truncation()
            (counted,) = backend.encode_batch_fast([text], add_special_tokens=special_tokens)
        return len(counted) > tokens

    def _loses(self, text: str, ids: Sequence[int]) -> bool:
        """Whether nothing of a text is left but what the template adds. Call it with the lock."""
        if not text.strip() or len(ids) > self.tokenizer.num_special_tokens_to_add():
            return False
        return not self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _without_final_eos(self, prompt: str, ids: list[int]) -> list[int]:
        """A template that closes the text with an end of sequence would end the generation."""
        eos = self.eos_id
        closes = bool(ids) and ids[-1] == eos and not prompt.endswith(str(self.tokenizer.eos_token))
        return ids[:-1] if closes else ids

    def _check(self, ids: Sequence[int], index: int) -> None:
        if not ids:
            raise InvalidInput(
                f"Input {index} is empty.",
                found="no tokens",
                expected="at least one token",
                fix="Send some text.",
            )
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            raise InvalidInput(
                f"Input {index} has a token that the base does not know.",
                found=f"token id {max(ids)}",
                expected=f"ids below {self.vocab_size}",
                fix="The tokenizer and the base do not belong together; tell the operator.",
            )
