"""Long texts: refused before they are tokenized, and cut, as if they had been tokenized whole."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server import demo
from server.edge.endpoints.schemas import PredictRequest
from server.edge.endpoints.schemas_openai import CompletionRequest
from server.inputs.text import InputTooLong, Text
from server.inputs.token_bound import COMPOSED_CHARACTERS, TokenBound
from tests.stand import tiny_bases

PIECES = (
    "film",
    "a",
    "Zoë",
    " ",
    "  ",
    "\n",
    "e\u0301",
    "ﬁ",
    "12",
    "!",
    "…",
    "don't",
    "[MASK]",
    "中文",
)


def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(demo.BASE_DIR), local_files_only=True)


def composing() -> Any:
    """Byte letters alone, behind NFKC."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!")


def pieces_of_bert() -> Any:
    made = tiny_bases.tokenizer("bert")
    made.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    return made


KINDS = {"bytes": demo_tokenizer, "composing": composing, "words": pieces_of_bert}


@pytest.mark.parametrize("kind", KINDS)
def test_bound_never_exceeds_the_tokens_that_a_text_has(kind: str) -> None:
    tokenizer, choose = KINDS[kind](), random.Random(7)
    bound = TokenBound.of(tokenizer.backend_tokenizer)
    assert bound.words == 1
    for _ in range(200):
        text = "".join(choose.choices(PIECES + (" ",) * 6, k=choose.randint(1, 60)))
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert not bound.exceeds(text, count)
    assert bound.exceeds("word " * 100, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_text_has_the_tokens_of_the_whole_one(kind: str) -> None:
    tokenizer, choose = KINDS[kind](), random.Random(8)
    bound = TokenBound.of(tokenizer.backend_tokenizer)
    shorter = 0
    for _ in range(200):
        text = "".join(choose.choices(PIECES + (" film",) * 9, k=200))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        most = choose.randint(1, 12)
        head, tail = bound.head(text, most), bound.tail(text, most)
        assert tokenizer(head, add_special_tokens=False)["input_ids"][:most] == whole[:most]
        assert tokenizer(tail, add_special_tokens=False)["input_ids"][-most:] == whole[-most:]
        shorter += (len(head) < len(text)) + (len(tail) < len(text))
    assert shorter > 100


def test_no_character_is_composed_of_more_than_the_bound_allows() -> None:
    for form in ("NFD", "NFKD"):
        for code in range(0x110000):
            if not 0xD800 <= code < 0xE000:
                composed = unicodedata.normalize("NFC" if form == "NFD" else "NFKC", chr(code))
                for one in composed:
                    assert len(unicodedata.normalize("NFD", one)) <= COMPOSED_CHARACTERS


def test_word_of_any_length_that_is_one_unknown_token_is_not_refused() -> None:
    text = Text(tiny_bases.tokenizer("bert"), max_tokens=8, vocab_size=tiny_bases.VOCABULARY)
    (item,) = text.encode(["x" * 200_000], "text-classification")
    assert len(item.token_ids) == 3


@pytest.mark.parametrize("spaces", ["Removed", None])
def test_tokenizer_that_drops_or_cannot_be_read_has_no_bound(spaces: str | None) -> None:
    tokenizer = demo_tokenizer()
    backend = tokenizer.backend_tokenizer
    if spaces is None:
        assert TokenBound.of(object()) == TokenBound()
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), backend.pre_tokenizer]
    )
    assert TokenBound.of(backend) == TokenBound()


class Untouched:
    """A tokenizer that must not be called."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        assert name != "backend_tokenizer"
        return getattr(self._real, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the text was tokenized")


def test_text_that_cannot_fit_is_refused_without_being_tokenized() -> None:
    text = Text(demo_tokenizer(), max_tokens=512)
    text.tokenizer = Untouched(text.tokenizer)
    for long in ("word " * 200_000, "x" * 1_000_000):
        with pytest.raises(InputTooLong) as caught:
            text.encode([long], "text-classification")
        assert caught.value.found == "more than 512 tokens"
        assert caught.value.expected == "at most 512 tokens"
        with pytest.raises(InputTooLong):
            text.encode_prompt(long, max_new_tokens=4)


def test_truncation_of_a_long_text_tokenizes_only_what_is_kept() -> None:
    text, seen = Text(demo_tokenizer(), max_tokens=16), []
    real = text.tokenizer
    long = " ".join(f"word{i} film" for i in range(50_000))
    ids = real(long)["input_ids"]

    class Noted(Untouched):
        def __call__(self, *given: Any, **options: Any) -> Any:
            seen.append(len(given[0]))
            return real(*given, **options)

    text.tokenizer = Noted(real)
    (item,) = text.encode([long], "text-classification", truncation=True)
    assert list(item.token_ids) == ids[:16]
    prompt = text.encode_prompt(long, max_new_tokens=4, truncation=True)
    assert list(prompt) == [ids[0], *ids[-11:]]
    assert max(seen) < 1000


def test_tokenizer_for_long_texts_shares_neither_state_nor_lock() -> None:
    text = Text(demo_tokenizer(), max_tokens=512)
    assert text.apart is text.apart
    assert text.apart.tokenizer is not text.tokenizer
    with text._lock:
        assert text.apart.encode_prompt("a film") == text.apart.encode_prompt("a film")
    short = text.limited(4)
    assert short.max_tokens == short.apart.max_tokens == 4
    assert text.max_tokens == text.apart.max_tokens == 512
    assert short.apart._lock is text.apart._lock


def test_one_wrong_item_of_a_list_is_told_and_not_every_one() -> None:
    with pytest.raises(Exception, match="validation error") as caught:
        PredictRequest.model_validate({"inputs": [1] * 10_000})
    assert caught.value.error_count() < 10  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="validation error") as caught:
        CompletionRequest.model_validate({"model": "a", "prompt": [None] * 10_000})
    assert caught.value.error_count() < 10  # type: ignore[attr-defined]
