"""Long texts: refused before they are tokenized, and cut, as if they had been tokenized whole."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server import demo
from server.edge.endpoints.schemas import PredictRequest
from server.edge.endpoints.schemas_openai import CompletionRequest
from server.inputs.text import Text
from server.inputs.text_errors import InputTooLong
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


CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
# As these families publish their tokenizers: one pattern after the other.
SPLITS = {
    "gpt2": (rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",),
    "llama3": (rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",),
    "qwen": (rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",),
    "gpt4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:{CONTRACTIONS})?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:{CONTRACTIONS})?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        rf"{MARKS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def splitting(
    *patterns: str, behavior: str = "isolated", merges: tuple[tuple[str, str], ...] = ()
) -> Any:
    """Byte letters, a few merges, and the patterns one after the other."""
    pairs: list[tuple[str, str]] = [
        ("Ġ", "f"),
        ("Ġf", "i"),
        ("1", "2"),
        ("Ġ", "Ġ"),
        ("a", "Ġ"),
        *merges,
    ]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in pairs)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    splits = [pre_tokenizers.Split(Regex(one), behavior) for one in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!")


def split_like(family: str) -> Callable[[], Any]:
    return lambda: splitting(*SPLITS[family])


KINDS: dict[str, Callable[[], Any]] = {one: split_like(one) for one in SPLITS}
KINDS |= {"bytes": demo_tokenizer, "composing": composing, "words": pieces_of_bert}


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


UNKNOWN = (
    r"(?<=film )[a-z]+|\p{L}+|\p{N}+|\s+",  # looks back
    r"[a-z ]+|\p{L}+|\p{N}+",  # goes on over spaces
    r"\p{N}{1,3}",  # does not split at words, and a token of the vocabulary goes on
    r"\p{L}+|\s+",  # no digits
    rf"{SPLITS['qwen'][0]}|x",  # one alternative that is not known
)


@pytest.mark.parametrize("pattern", UNKNOWN)
def test_pattern_of_which_too_little_is_known_is_not_cut(pattern: str) -> None:
    assert not TokenBound.of(splitting(pattern).backend_tokenizer).cuts


@pytest.mark.parametrize("behavior", ["merged_with_previous", "merged_with_next", "contiguous"])
def test_pattern_whose_pieces_are_put_together_again_is_not_cut(behavior: str) -> None:
    made = splitting(SPLITS["qwen"][0], behavior=behavior)
    assert not TokenBound.of(made.backend_tokenizer).cuts


def test_pattern_that_reads_byte_letters_is_not_cut() -> None:
    made = splitting(SPLITS["qwen"][0])
    backend = made.backend_tokenizer
    bytes_first = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([bytes_first, backend.pre_tokenizer[0]])
    assert not TokenBound.of(backend).cuts  # to it a space is a letter


@pytest.mark.parametrize(("content", "cuts"), [("MASK", False), ("[MASK]", True)])
def test_added_token_that_takes_the_space_behind_a_word_along_is_not_cut(
    content: str, cuts: bool
) -> None:
    made = splitting(*SPLITS["qwen"])
    made.add_tokens([AddedToken(content, rstrip=True, normalized=False)])
    assert TokenBound.of(made.backend_tokenizer).cuts is cuts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_span_task_cuts_as_the_whole_text_is_cut(kind: str, task: Any, side: str) -> None:
    text, choose = Text(KINDS[kind](), max_tokens=24), random.Random(9)
    text.tokenizer.truncation_side = side
    for _ in range(40):
        long = "".join(choose.choices(PIECES + (" film",) * 9, k=300)) + " end"
        given: Any = long if task == "token-classification" else ("a film", long)
        (cut,) = text.tokenize([given], task, truncation=True)
        pair = (given,) if isinstance(given, str) else given
        whole = text.tokenizer(
            *pair,
            truncation=True if len(pair) == 1 else "only_second",
            max_length=24,
            return_offsets_mapping=True,
        )
        assert list(cut.token_ids) == whole["input_ids"]
        assert cut.text == long
        wanted = len(pair) - 1
        assert cut.offsets == tuple(
            offsets if number == wanted else (0, 0)
            for offsets, number in zip(whole["offset_mapping"], whole.sequence_ids(0), strict=True)
        )


def test_first_of_a_pair_that_fills_the_context_is_refused_without_being_tokenized() -> None:
    text = Text(demo_tokenizer(), max_tokens=512)
    text.tokenizer = Untouched(text.tokenizer)
    with pytest.raises(InputTooLong, match="too long") as caught:
        text.tokenize([("word " * 200_000, "short")], "question-answering", truncation=True)
    assert caught.value.found == "a first text that fills the context"


def test_no_character_is_composed_of_more_than_the_bound_allows() -> None:
    for form in ("NFD", "NFKD"):
        for code in range(0x110000):
            if not 0xD800 <= code < 0xE000:
                composed = unicodedata.normalize("NFC" if form == "NFD" else "NFKC", chr(code))
                for one in composed:
                    assert len(unicodedata.normalize("NFD", one)) <= COMPOSED_CHARACTERS


def test_word_of_any_length_that_is_one_unknown_token_is_not_refused() -> None:
    text = Text(tiny_bases.tokenizer("bert"), max_tokens=8, vocab_size=tiny_bases.VOCABULARY)
    (item,) = text.tokenize(["x" * 100_000], "text-classification")
    assert len(item.token_ids) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "long", ["x" * 2_000_000, "中" * 2_000_000, "😀" * 500_000, " " * 2_000_000]
)
def test_megabytes_without_a_place_to_cut_are_refused_without_being_tokenized(
    kind: str, long: str
) -> None:
    text = Text(KINDS[kind](), max_tokens=512)
    text.tokenizer = Untouched(text.tokenizer)
    for cut in (False, True):
        with pytest.raises(InputTooLong):
            text.tokenize([long], "text-classification", truncation=cut)
        with pytest.raises(InputTooLong):
            text.tokenize([("a", long)], "question-answering", truncation=cut)
        with pytest.raises(InputTooLong):
            text.tokenize_prompt(long, max_new_tokens=4, truncation=cut)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_spaces_are_cut_at_marks_and_ends_of_lines(kind: str) -> None:
    tokenizer, choose = KINDS[kind](), random.Random(10)
    bound = TokenBound.of(tokenizer.backend_tokenizer)
    pieces = (
        "中文",
        "漢",
        "。",
        "，",
        "\n",
        "\n\n",
        "film",
        "12",
        " ",
        "'s",
        "！",
        "か",
        "фи",
        "ﬁ",
    )
    shorter = 0
    for _ in range(300):
        text = "".join(choose.choices(pieces, k=200))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        most = choose.randint(1, 12)
        head, tail = bound.head(text, most), bound.tail(text, most)
        assert tokenizer(head, add_special_tokens=False)["input_ids"][:most] == whole[:most]
        assert tokenizer(tail, add_special_tokens=False)["input_ids"][-most:] == whole[-most:]
        shorter += (len(head) < len(text)) + (len(tail) < len(text))
    assert shorter > 400


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
            text.tokenize([long], "text-classification")
        assert caught.value.found == "more than 512 tokens"
        assert caught.value.expected == "at most 512 tokens"
        with pytest.raises(InputTooLong):
            text.tokenize_prompt(long, max_new_tokens=4)


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
    (item,) = text.tokenize([long], "text-classification", truncation=True)
    assert list(item.token_ids) == ids[:16]
    prompt = text.tokenize_prompt(long, max_new_tokens=4, truncation=True)
    assert list(prompt) == [ids[0], *ids[-11:]]
    assert max(seen) < 1000


def test_tokenizer_for_long_texts_shares_neither_state_nor_lock() -> None:
    text = Text(demo_tokenizer(), max_tokens=512)
    assert text.apart is text.apart
    assert text.apart.tokenizer is not text.tokenizer
    with text._lock:
        assert text.apart.tokenize_prompt("a film") == text.apart.tokenize_prompt("a film")
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
