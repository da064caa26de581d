"""What is known of a text's tokens before it is tokenized: how many at least, and where to cut it.

Tokenizing megabytes takes seconds. Most such texts cannot fit any context, which their length or
the number of their words shows at once; and of a text that is to be cut, only the part that is kept
needs to be tokenized. Everything here errs on the side of tokenizing: a tokenizer that drops, fuses
or spans characters in a way that is not known here has no bound and no place to cut.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Final, Self

# Characters of a text that may become one in each normal form that composes them (U+1F82, for one).
COMPOSED_CHARACTERS: Final = 4
BOUND_SLICE_CHARACTERS: Final = 1 << 16
_SPACES: Final = " \u0120\u2581"  # as texts, byte-level vocabularies and sentencepiece write it
_WORD: Final = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
_KEEPS_CHARACTERS: Final = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}
_KEEPS_WORDS: Final = {*_KEEPS_CHARACTERS, "BertNormalizer", "Strip", "StripAccents"}
_SPLITS_WORDS: Final = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_BYTES: Final = 256


@dataclass(frozen=True)
class TokenBound:
    """See the module.

    Args:
        characters: The most characters of a text that one token can stand for; None: any number.
        words: The most words, each begun behind a space, that one token can reach into; None: any.
        cuts: Whether the text before a word, and the text from it, are tokenized on their own.
        greedy: Added tokens that take any number of spaces beside them along.
    """

    characters: int | None = None
    words: int | None = None
    cuts: bool = False
    greedy: tuple[str, ...] = ()

    @classmethod
    def of(cls, backend: Any) -> Self:
        """Read it from a tokenizer of the tokenizers library; no bound where that says too little.

        Args:
            backend: ``tokenizers.Tokenizer``.
        """
        try:
            declared: dict[str, Any] = json.loads(backend.to_str())
            return cls._of(declared)
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()

    @classmethod
    def _of(cls, declared: Mapping[str, Any]) -> Self:
        model = declared["model"]
        kind = model["type"]
        normalizers = list(_flat(declared["normalizer"], "normalizers"))
        splitters = list(_flat(declared["pre_tokenizer"], "pretokenizers"))
        added = declared.get("added_tokens") or []
        contents = [str(one["content"]) for one in added]
        greedy = tuple(str(one["content"]) for one in added if one["lstrip"] or one["rstrip"])
        spaced = max((_words_in(content) for content in contents), default=1)
        loose = bool(greedy and normalizers and any(one["normalized"] for one in added))
        if kind in {"WordPiece", "WordLevel"}:
            # A word of any length may be one unknown token, but no token is two words.
            apart = bool(splitters) and splitters[0]["type"] in _SPLITS_WORDS
            if not apart or not all(_keeps(one, _KEEPS_WORDS) for one in normalizers):
                return cls()
            return cls(words=spaced, cuts=spaced == 1)
        if kind not in {"BPE", "Unigram"} or not _keeps_all(model, normalizers, splitters):
            return cls()
        vocabulary = _vocabulary(model)
        composes = any(one["type"] in {"NFC", "NFKC"} for one in normalizers)
        longest = max(len(token) for token in (*vocabulary, *contents))
        words = max(spaced, *(_words_in(token) for token in vocabulary))
        return cls(
            characters=None if loose else longest * (COMPOSED_CHARACTERS if composes else 1),
            words=words,
            cuts=words == 1 and not model.get("dropout") and all(map(_splits_by_place, splitters)),
            greedy=greedy,
        )

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether the text surely has more tokens than ``tokens``, those of a template aside."""
        if (
            self.characters is not None
            and len(text) > tokens * self.characters
            and not any(content in text for content in self.greedy)
        ):
            return True
        # The fewest characters that so many words can have, with the spaces between them.
        if self.words is None or len(text) <= 2 * tokens * self.words:
            return False
        found = 0
        for start in range(0, len(text), BOUND_SLICE_CHARACTERS):
            found += _count(text, start)
            if found > tokens * self.words:
                return True
        return False

    def head(self, text: str, tokens: int) -> str:
        """The start of a text, with more than ``tokens`` tokens, or the whole of it.

        What is left out changes none of the first ``tokens`` tokens.
        """
        if not self.cuts or len(text) <= 2 * tokens:
            return text
        found = next(islice(_WORD.finditer(text), tokens + 1, None), None)
        return text if found is None else text[: found.start()]

    def tail(self, text: str, tokens: int) -> str:
        """The end of a text, with more than ``tokens`` tokens, or the whole of it.

        What is left out changes none of the last ``tokens`` tokens.
        """
        if not self.cuts or len(text) <= 2 * tokens:
            return text
        left, end = tokens + 2, len(text)
        while end > 0:
            begin = max(0, end - BOUND_SLICE_CHARACTERS)
            places = [one.start() for one in _WORD.finditer(text, begin, end)]
            if len(places) >= left:
                return text[places[-left] :]
            left, end = left - len(places), begin
        return text


def _count(text: str, start: int) -> int:
    return sum(1 for _ in _WORD.finditer(text, start, start + BOUND_SLICE_CHARACTERS))


def _flat(part: Mapping[str, Any] | None, several: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, in order."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for one in part[several]:
        yield from _flat(one, several)


def _keeps(normalizer: Mapping[str, Any], kinds: set[str]) -> bool:
    if normalizer["type"] == "Replace":  # as sentencepiece's models write their spaces
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] == "\u2581")
    return normalizer["type"] in kinds


def _keeps_all(
    model: Mapping[str, Any],
    normalizers: Sequence[Mapping[str, Any]],
    splitters: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether every character of a text is in some token, and no token but an added one stands for
    more of them than its spelling has."""
    if not all(_keeps(one, _KEEPS_CHARACTERS) for one in normalizers):
        return False
    for one in splitters:
        if one["type"] not in {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}:
            return False
        if one.get("behavior") == "Removed":
            return False
    vocabulary = set(_vocabulary(model))
    if any(one["type"] == "ByteLevel" for one in (*normalizers, *splitters)):
        return _byte_letters() <= vocabulary
    if model.get("byte_fallback"):
        return {f"<0x{byte:02X}>" for byte in range(_BYTES)} <= vocabulary
    known = set(string.ascii_letters + string.digits) <= vocabulary
    return known and model["type"] == "BPE" and bool(model["unk_token"]) and not model["fuse_unk"]


def _splits_by_place(splitter: Mapping[str, Any]) -> bool:
    """Whether a text is split at a place whatever comes before or after the words beside it."""
    return bool(splitter["type"] != "Split")  # a pattern of anybody's


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    if model["type"] == "Unigram":
        return [str(piece) for piece, _ in model["vocab"]]
    return list(model["vocab"])


def _words_in(token: str) -> int:
    """Words that a token reaches into: its start, and every one behind a space in it."""
    inner = sum(
        1 for before, after in pairwise(token) if before in _SPACES and after not in _SPACES
    )
    begun = bool(token) and token[0] not in _SPACES
    return max(1, inner + begun)


def _byte_letters() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
