"""Text as it grows: against the tokenizer's own decoding of the whole."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.inputs.detokenize import UNDECODED, Detokenizer, StopStrings, TextStream, spell
from tests.stand.dense import byte_tokenizer, spaced_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "spaced": spaced_tokenizer()}


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def spaced_ids(text: str) -> list[int]:
    """Llama's way: ▁ before words, bytes for what is no word."""
    tokenizer = TOKENIZERS["spaced"]
    ids = []
    for word in text.split(" "):
        piece = tokenizer.convert_tokens_to_ids("▁" + word)
        if piece:
            ids.append(piece)
        else:
            names = [f"<0x{byte:02X}>" for byte in word.encode()]
            ids += tokenizer.convert_tokens_to_ids(["▁", *names])
    return ids


@given(st.text(max_size=40), st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_byte_tokens_add_up_to_the_text(prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, prompt))
    shown = ""
    for token in encode(tokenizer, text):
        shown += detokenizer.push(token)
        assert text.startswith(shown)  # never half a character, never one taken back
    assert shown + detokenizer.flush() == text.rstrip("\ufffd")


@given(
    st.lists(st.sampled_from(["to", "be", "or", "not", "€", "日本", "x😀y"]), max_size=8),
    st.lists(st.sampled_from(["to", "be", "or", "not", "€", "日本", "x😀y"]), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_spaces_between_words_survive(before: list[str], after: list[str]) -> None:
    tokenizer = TOKENIZERS["spaced"]
    prompt = [1, *(spaced_ids(" ".join(before)) if before else [])]
    text = " ".join(after)
    detokenizer = Detokenizer(tokenizer, prompt)
    shown = [detokenizer.push(token) for token in (spaced_ids(text) if after else [])]
    shown.append(detokenizer.flush())
    wanted = f" {text}" if before and after else text
    assert "".join(shown) == wanted
    assert not any("\ufffd" in piece for piece in shown)


def test_a_character_over_several_tokens_comes_whole() -> None:
    tokenizer = TOKENIZERS["spaced"]
    names = [f"<0x{byte:02X}>" for byte in "😀".encode()]
    detokenizer = Detokenizer(tokenizer, [1])
    pieces = [detokenizer.push(i) for i in tokenizer.convert_tokens_to_ids([*names, "a"])]
    assert pieces == ["", "", "", "", "😀a"]
    spelled = spell(tokenizer, tokenizer.convert_tokens_to_ids([*names, "a"]))
    assert [piece.text for piece in spelled] == ["", "", "", "😀", "a"]


def test_a_byte_that_does_not_fit_spoils_the_run_as_it_does_for_the_tokenizer() -> None:
    tokenizer = TOKENIZERS["spaced"]
    euro = [f"<0x{byte:02X}>" for byte in "€".encode()]
    ids = tokenizer.convert_tokens_to_ids([*euro, "<0x80>", "a"])
    detokenizer = Detokenizer(tokenizer, [1])
    shown = [detokenizer.push(token) for token in ids]
    assert shown == ["", "", "", "", UNDECODED * 4 + "a"]
    assert "".join(shown) == tokenizer.decode(ids)


def test_an_incomplete_character_at_the_end_is_left_out() -> None:
    tokenizer = TOKENIZERS["spaced"]
    names = ["a", *(f"<0x{byte:02X}>" for byte in "😀".encode()[:3])]
    detokenizer = Detokenizer(tokenizer, [1])
    shown = "".join(detokenizer.push(token) for token in tokenizer.convert_tokens_to_ids(names))
    assert shown + detokenizer.flush() == "a"


def test_bytes_that_are_no_text_do_not_hold_back_what_follows() -> None:
    tokenizer = TOKENIZERS["bytes"]
    continuation = tokenizer.convert_tokens_to_ids("¿")  # the byte 0xBF, alone never a character
    detokenizer = Detokenizer(tokenizer, [])
    for _ in range(50):
        detokenizer.push(continuation)
    euro = encode(tokenizer, "€ to")
    assert "".join(detokenizer.push(token) for token in euro).endswith("€ to")


@pytest.mark.parametrize("before", range(14))
def test_a_character_after_bytes_that_are_no_text_is_not_cut(before: int) -> None:
    tokenizer = TOKENIZERS["bytes"]
    continuation = tokenizer.convert_tokens_to_ids("¿")
    characters = ["ð", "Ł", "Ľ", "ħ"]  # the bytes of 🛅, as byte-level BPE writes them
    ids = [continuation] * before + tokenizer.convert_tokens_to_ids(characters)
    detokenizer = Detokenizer(tokenizer, [])
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert shown == "\ufffd" * before + "🛅"


def test_a_prompt_is_not_read_from_the_middle_of_a_character() -> None:
    tokenizer = TOKENIZERS["spaced"]
    prompt = [1, *spaced_ids("to 😀😀")]
    detokenizer = Detokenizer(tokenizer, prompt)
    euro = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "€".encode()])
    assert [detokenizer.push(token) for token in euro] == ["", "", ""]
    assert detokenizer.flush() == "€"


def test_special_tokens_add_no_text() -> None:
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(tokenizer, [0])
    ids = [*encode(tokenizer, "to"), 1, *encode(tokenizer, " be")]
    assert "".join(stream.push(token)[0] for token in ids) + stream.finish() == "to be"


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One of each model of tokenizers, with the decoder that models of its kind come with."""
    words = ["w1", "w2", "don", "'", "t", ".", ",", "!", "x", "é"]
    under = ["▁" + word for word in words] + ["▁", "▁▁", *words]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    backend: Tokenizer
    if kind == "WordLevel":
        backend = Tokenizer(models.WordLevel(_ids(["[UNK]", *words]), unk_token="[UNK]"))
    elif kind == "WordPiece":
        pieces = ["[UNK]", *words, *("##" + word for word in words)]
        backend = Tokenizer(models.WordPiece(_ids(pieces), unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
    elif kind == "Unigram":
        backend = Tokenizer(models.Unigram([(one, -1.0) for one in ["<unk>", *under]], unk_id=0))
        backend.decoder = decoders.Metaspace()
    elif kind == "BPE":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        joined = [("Ġ", "w"), ("Ã", "©"), ("â", "Ĥ"), ("¬", "â"), ("Ĥ", "ð")]
        vocabulary = _ids([*alphabet, *(left + right for left, right in joined)])
        backend = Tokenizer(models.BPE(vocabulary, joined))
        backend.decoder = decoders.ByteLevel()
    else:
        pieces = ["<unk>", *raw, *under]
        backend = Tokenizer(models.BPE(_ids(pieces), [], byte_fallback=True, unk_token="<unk>"))
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    backend.add_special_tokens([AddedToken(one, special=True) for one in ("<s>", "</s>", "<t>")])
    backend.add_tokens([AddedToken("<added>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _ids(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


KINDS = {kind: tokenizer_of(kind) for kind in ("WordLevel", "WordPiece", "Unigram", "BPE", "bytes")}


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_text_is_the_tokenizers_own_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    special = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<t>"])
    beyond = len(tokenizer) + 5  # a row of the embedding that no token has
    one = st.integers(0, len(tokenizer) - 1) | st.sampled_from([*special, beyond])
    bytes_ = st.sampled_from("€ é日😀w").map(lambda it: [0] if kind != "bytes" else [
        tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in it.encode()
    ])  # fmt: skip
    runs = st.lists(one.map(lambda it: [it]) | bytes_, max_size=20)
    prompt = list(chain.from_iterable(data.draw(runs)))
    answer = list(chain.from_iterable(data.draw(runs)))
    before = whole(tokenizer, prompt)
    own = whole(tokenizer, prompt + answer)
    assume(not before.endswith(UNDECODED) and not own.endswith(UNDECODED))
    assume(own.startswith(before))  # else the answer's bytes spoil those of the prompt
    stream = TextStream(tokenizer, prompt)
    events = [stream.push(token) for token in answer]
    assert "".join(shown for _, shown in events) + stream.finish() == own[len(before) :]
    assert stream.text == own[len(before) :]
    readable = "".join(piece.text for piece in spell(tokenizer, prompt) if not piece.special)
    assert readable == before


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram", "bytes"])
def test_a_special_token_in_the_middle_costs_no_space(kind: str) -> None:
    tokenizer = KINDS[kind]
    mark = "▁" if kind in ("Unigram", "bytes") else ""
    ids = tokenizer.convert_tokens_to_ids([f"{mark}w1", "<t>", "<s>", f"{mark}w2"])
    stream = TextStream(tokenizer, tokenizer.convert_tokens_to_ids([f"{mark}x", "</s>"]))
    assert [stream.push(token)[0] for token in ids] == [" w1", "", "", " w2"]


stops_of = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.text("ab", max_size=3), max_size=15), stops_of)
@settings(max_examples=400, deadline=None)
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    read = ""
    for part in parts:
        shown += matcher.push(part)
        read += part
        starts = [at for stop in stops if (at := read.find(stop)) >= 0]
        if starts:
            assert matcher.found is not None
            assert shown == read[: min(starts)]
            return
        assert matcher.found is None
        assert read.startswith(shown)
        held = read[len(shown) :]
        # Nothing is held back longer than it could still become a stop string.
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert shown + matcher.flush() == read


@pytest.mark.parametrize("stop", ["be or", "r n", "not", "t"])
def test_stop_strings_are_found_across_tokens(stop: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    text = "to be or not"
    stream = TextStream(tokenizer, [], [stop])
    shown = ""
    for token in encode(tokenizer, text):
        shown += stream.push(token)[1]
        if stream.stopped:
            break
    assert stream.stopped
    assert shown + stream.finish() == stream.text == text[: text.find(stop)]


def test_what_was_held_back_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(tokenizer, [], ["not that"])
    shown = "".join(stream.push(token)[1] for token in encode(tokenizer, "to be not"))
    assert shown == "to be "
    assert stream.finish() == "not"
    assert stream.text == "to be not"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_text_where_they_are_wanted(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    words = encode(tokenizer, "to be") if name == "bytes" else spaced_ids("to be")
    ids = [start, *words, start, *words, end]
    stream = TextStream(tokenizer, words, shown=(start, words[0]))
    shown = ""
    for token in ids:
        peeked = stream.peek(token)
        added, more = stream.push(token)
        assert peeked == added
        shown += more
    assert shown + stream.finish() == stream.text
    parts = stream.text.split("<s>")
    assert [one.strip() for one in parts] == ["", "to be", "to be"]
    stopped = TextStream(tokenizer, words, ["<s>"], shown=(start,))
    for token in [*words, start, *words]:
        stopped.push(token)
        if stopped.stopped:
            break
    assert (stopped.stopped, stopped.text.strip()) == (True, "to be")


def test_no_stop_string_begins_in_the_tokens_that_are_free() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = encode(tokenizer, "to be or not to be")
    for free in range(len(ids) + 1):
        stream = TextStream(tokenizer, [], ["be"], free_tokens=free)
        for token in ids:
            stream.push(token)
            if stream.stopped:
                break
        before = "".join(tokenizer.decode([one]) for one in ids[:free])
        after = "".join(tokenizer.decode([one]) for one in ids[free:])
        assert stream.text + stream.finish() == before + after.partition("be")[0]
