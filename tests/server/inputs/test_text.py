"""Texts to tokens: limits, spans, masks and what is no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.inputs.text import Text
from server.inputs.text_errors import InputTooLong, InvalidInput
from server.inputs.tokenizer import TokenizerError
from tests.stand import tiny_bases
from tests.stand.dense import byte_tokenizer

MOST = 8


@pytest.fixture
def text() -> Text:
    return Text(tiny_bases.tokenizer("bert"), max_tokens=MOST, vocab_size=tiny_bases.VOCABULARY)


@pytest.fixture
def prompts() -> Text:
    return Text(byte_tokenizer(), max_tokens=MOST)


def test_offsets_point_into_the_text(text: Text) -> None:
    (item,) = text.tokenize(["ann in  paris"], "token-classification")
    assert item.text is not None
    assert item.offsets is not None
    words = [item.text[start:end] for start, end in item.offsets]
    assert words == ["", "ann", "in", "paris", ""]
    (plain,) = text.tokenize(["ann in  paris"], "text-classification")
    assert (plain.text, plain.offsets) == (None, None)
    assert plain.token_ids == item.token_ids


def test_spans_of_a_pair_are_those_of_the_second_text(text: Text) -> None:
    (item,) = text.tokenize([("in paris", "by ann")], "question-answering")
    assert item.text == "by ann"
    assert item.offsets is not None
    assert [item.text[a:b] for a, b in item.offsets if a != b] == ["by", "ann"]


def test_a_text_of_just_the_limit_is_taken_and_one_more_is_not(text: Text) -> None:
    fits = "film " * (MOST - 2)
    (item,) = text.tokenize([fits], "text-classification")
    assert len(item.token_ids) == MOST
    with pytest.raises(InputTooLong, match="Input 1") as caught:
        text.tokenize(["film", fits + "film"], "text-classification")
    assert caught.value.code == "input_too_long"
    assert caught.value.found == f"{MOST + 1} tokens"
    (cut,) = text.tokenize([fits + "film"], "text-classification", truncation=True)
    assert cut.token_ids == item.token_ids, "cut at the end, specials kept"


def test_of_a_pair_the_second_text_is_cut(text: Text) -> None:
    (item,) = text.tokenize([("ann", "film " * 20)], "text-classification", truncation=True)
    assert len(item.token_ids) == MOST
    with pytest.raises(InputTooLong):
        text.tokenize([("film " * 20, "ann")], "text-classification", truncation=True)


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_a_lone_surrogate_is_refused(text: Text, task: Any) -> None:
    with pytest.raises(InvalidInput, match="Unicode"):
        text.tokenize(["a \ud800 film"], task)


def test_a_mask_is_needed_where_one_is_to_be_filled(text: Text) -> None:
    assert text.mask_id in text.tokenize(["a [MASK]"], "fill-mask")[0].token_ids
    with pytest.raises(InvalidInput, match="nothing to fill"):
        text.tokenize(["a film"], "fill-mask")
    with pytest.raises(InvalidInput, match="nothing to fill"):
        text.tokenize(["film " * 20 + "[MASK]"], "fill-mask", truncation=True)


def test_a_token_beyond_the_base_is_refused() -> None:
    small = Text(tiny_bases.tokenizer("bert"), max_tokens=MOST, vocab_size=6)
    with pytest.raises(InvalidInput, match="does not know"):
        small.tokenize(["film"], "text-classification")


def test_a_prompt_leaves_room_for_its_answer(prompts: Text) -> None:
    ids = prompts.tokenize_prompt("to be", max_new_tokens=2)
    with pytest.raises(InputTooLong, match="context"):
        prompts.tokenize_prompt("to be", max_new_tokens=MOST - len(ids) + 1)
    whole = prompts.tokenize_prompt("to be", max_new_tokens=MOST - len(ids))
    assert whole == ids
    cut = prompts.tokenize_prompt("€" * 20, max_new_tokens=3, truncation=True)
    assert len(cut) == MOST - 3


def test_a_cut_prompt_keeps_its_end(prompts: Text) -> None:
    wide = Text(byte_tokenizer(), max_tokens=100)
    whole = wide.tokenize_prompt("to be or not to be that is")
    cut = prompts.tokenize_prompt("to be or not to be that is", truncation=True, max_new_tokens=4)
    assert cut == whole[-4:]


def test_an_empty_prompt_is_the_start_token(prompts: Text) -> None:
    assert prompts.tokenize_prompt("") == (prompts.tokenizer.bos_token_id,)


def test_the_template_without_tools_is_the_one_for_conversations(prompts: Text) -> None:
    for given, found in (
        (None, None),
        ("{{ messages }}", "{{ messages }}"),
        ({"tool_use": "x"}, None),
        ({"tool_use": "x", "default": "y"}, "y"),
    ):
        prompts.tokenizer.chat_template = given
        assert prompts.chat_template == found


def test_a_token_and_its_id_are_of_the_base_or_none(prompts: Text) -> None:
    start = prompts.tokenizer.bos_token
    assert prompts.id_of(start) == prompts.tokenizer.bos_token_id
    assert prompts.token_of(prompts.tokenizer.bos_token_id) == start
    assert prompts.id_of("no such token") is None
    assert prompts.token_of(-1) is None
    assert prompts.token_of(1 << 40) is None


def test_padding_is_an_id_that_the_base_has() -> None:
    tokenizer = byte_tokenizer()
    assert Text(tokenizer, max_tokens=4).pad_id == 2
    assert Text(tokenizer, max_tokens=4, pad_id=7).pad_id == 7
    assert Text(tokenizer, max_tokens=4, vocab_size=2).pad_id == 1
    assert Text(tokenizer, max_tokens=4, vocab_size=1, pad_id=9).pad_id == 0


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        Text.load(tmp_path, max_tokens=4)
    assert caught.value.code == "base_unusable"
