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
from itertools import pairwise
from typing import Any, Final, Self

# Characters of a text that may become one in each normal form that composes them (U+1F82, for one).
COMPOSED_CHARACTERS: Final = 4
BOUND_SLICE_CHARACTERS: Final = 1 << 16
_SPACES: Final = " \u0120\u2581"  # as texts, byte-level vocabularies and sentencepiece write it
_WORD: Final = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
# Also where a line ends, and before a mark that ends a clause where words have no spaces; letters
# of those scripts, of Cyrillic and of Hangul count as well.
_LETTER: Final = "A-Za-z0-9\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARK: Final = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
# What is cut at stands first, for which the whole text is searched fast.
_PLACE: Final = re.compile(f"[ \\n{_MARK}](?<=[{_LETTER}].)(?:(?<! )|(?=[{_LETTER}]))", re.DOTALL)
_KEEPS_CHARACTERS: Final = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}
_KEEPS_WORDS: Final = {*_KEEPS_CHARACTERS, "BertNormalizer", "Strip", "StripAccents"}
_SPLITS_WORDS: Final = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_WRITES_SPACES: Final = {"ByteLevel", "Metaspace", "Replace", "Prepend"}
_BYTES: Final = 256
_CONTRACTIONS: Final = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Alternatives of the patterns by which byte-level tokenizers split (GPT-2, Llama 3, Qwen, GPT-4o,
# DeepSeek and their like). None matches a letter or digit together with a space behind it, and none
# looks back, or ahead by more than a character.
_LETTERS: Final = frozenset(
    {
        r" ?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    }
)
_DIGIT_FORMS: Final = frozenset({r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"})
_OTHER: Final = frozenset(
    {
        *_CONTRACTIONS.split("|"),
        f"(?i:{_CONTRACTIONS})",
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?",
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?",
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+",
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*",
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    }
)
# Of which the two together match any letter, where those above are not there.
_CASES: Final = (
    {one for one in _OTHER if f"{_UPPER}*{_LOWER}+" in one},
    {one for one in _OTHER if f"{_UPPER}+{_LOWER}*" in one},
)


@dataclass(frozen=True)
class TokenBound:
    """See the module.

    Args:
        characters: The most characters of a text that one token can stand for; None: any number.
        words: The most words, each begun behind a space, that one token can reach into; None: any.
        cuts: Whether the text before a word, and the text from it, are tokenized on their own.
        everywhere: Whether it may also be cut at ends of lines and marks, in more scripts.
        greedy: Added tokens that take any number of spaces beside them along.
    """

    characters: int | None = None
    words: int | None = None
    cuts: bool = False
    everywhere: bool = False
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
        added_marks = any(_PLACE.search(content) for content in contents) or bool(greedy)
        spaced = max((_words_in(content) for content in contents), default=1)
        # Of these a space behind a word, or before it, may be a part.
        sticky = any(one[0].isalnum() or one[-1].isalnum() for one in greedy if one)
        loose = bool(greedy and normalizers and any(one["normalized"] for one in added))
        if kind in {"WordPiece", "WordLevel"}:
            # A word of any length may be one unknown token, but no token is two words.
            apart = bool(splitters) and splitters[0]["type"] in _SPLITS_WORDS
            if not apart or not all(_keeps(one, _KEEPS_WORDS) for one in normalizers):
                return cls()
            cuts = spaced == 1 and not sticky
            marks = splitters[0]["type"] != "WhitespaceSplit"
            return cls(words=spaced, cuts=cuts, everywhere=cuts and marks and not added_marks)
        if kind not in {"BPE", "Unigram"} or not _keeps_all(model, normalizers, splitters):
            return cls()
        vocabulary = _vocabulary(model)
        by_pattern = any(
            (one["type"] == "ByteLevel" and one.get("use_regex", True)) or one["type"] == "Split"
            for one in splitters
        )
        composes = any(one["type"] in {"NFC", "NFKC"} for one in normalizers)
        longest = max(len(token) for token in (*vocabulary, *contents))
        words = max(spaced, *(_words_in(token) for token in vocabulary))
        # What is between two words is in pieces of their own, or at least in no token with them.
        apart = _split_at_words(splitters) or not any(map(_goes_on, vocabulary))
        # A pattern is read as one of texts, not of what byte letters or signs for spaces make them.
        patterns = [at for at, one in enumerate(splitters) if one["type"] == "Split"]
        written = any(one["type"] in _WRITES_SPACES for one in normalizers) or any(
            one["type"] in _WRITES_SPACES for one in splitters[: max(patterns, default=0)]
        )
        cuts = (
            words == 1
            and apart
            and not (patterns and written)
            and not sticky
            and not model.get("dropout")
            and all(map(_splits_by_place, splitters))
        )
        return cls(
            characters=None if loose else longest * (COMPOSED_CHARACTERS if composes else 1),
            words=words,
            cuts=cuts,
            everywhere=cuts
            and by_pattern
            and _split_at_words(splitters)
            and not written
            and not added_marks,
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

    @property
    def _places(self) -> re.Pattern[str]:
        return _PLACE if self.everywhere else _WORD

    def head(self, text: str, tokens: int) -> str:
        """The start of a text, with more than ``tokens`` tokens, or the whole of it.

        What is left out changes none of the first ``tokens`` tokens.
        """
        if not self.cuts or len(text) <= 2 * tokens:
            return text
        left = tokens + 2
        for start in range(0, len(text), BOUND_SLICE_CHARACTERS):  # others run between two slices
            for one in self._places.finditer(text, start, start + BOUND_SLICE_CHARACTERS):
                left -= 1
                if not left:
                    return text[: one.start()]
        return text

    def tail(self, text: str, tokens: int) -> str:
        """The end of a text, with more than ``tokens`` tokens, or the whole of it.

        What is left out changes none of the last ``tokens`` tokens.
        """
        if not self.cuts or len(text) <= 2 * tokens:
            return text
        left, end = tokens + 2, len(text)
        while end > 0:
            begin = max(0, end - BOUND_SLICE_CHARACTERS)
            places = [one.start() for one in self._places.finditer(text, begin, end)]
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
    if splitter["type"] != "Split":
        return True
    plain = splitter["behavior"] == "Isolated" and not splitter["invert"]
    return plain and _branches(splitter) <= _LETTERS | _DIGIT_FORMS | _OTHER


def _split_at_words(splitters: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a split before every space between two letters or digits."""
    found: set[str] = set()
    for one in splitters:
        if one["type"] == "ByteLevel" and one.get("use_regex", True):
            return True
        if one["type"] == "Metaspace" and one.get("split", True):
            return True
        if one["type"] == "Split" and _splits_by_place(one):
            found |= _branches(one)  # each letter or digit ends a match of the first that has it
    return bool((found & _LETTERS or all(found & one for one in _CASES)) and found & _DIGIT_FORMS)


def _branches(splitter: Mapping[str, Any]) -> set[str]:
    """The alternatives of a pattern; the whole of one that is no regular expression."""
    pattern = splitter["pattern"].get("Regex")
    if pattern is None:
        return {json.dumps(splitter["pattern"])}
    found, start, depth, at = set(), 0, 0, 0
    while at < len(pattern):
        match pattern[at]:
            case "\\":
                at += 1
            case "[" | "(":  # a bracket within a class counts twice, and then nothing is known
                depth += 1
            case "]" | ")":
                depth -= 1
            case "|" if depth == 0:
                found.add(pattern[start:at])
                start = at + 1
        at += 1
    return {*found, pattern[start:]}


def _goes_on(token: str) -> bool:
    """Whether a space follows a letter or digit within a token."""
    return any(before.isalnum() and after in _SPACES for before, after in pairwise(token))


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
