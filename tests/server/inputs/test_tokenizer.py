"""Tokenizers of folders as they come: the file's ids are served, and an empty one is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from server.inputs.text import Text
from server.inputs.text_errors import InvalidInput
from server.inputs.tokenizer import PROBES, TokenizerError, load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(40)), "film", "2024", "good"]


def folder_with(place: Path, model_type: str, made: Tokenizer | None, **config: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    if made is not None:
        made.save(str(place / "tokenizer.json"))
    return place


def word_level() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(one, special=True) for one in ("<s>", "</s>")])
    return made


def byte_level(*, digits: bool = False, lowercase: bool = False) -> Tokenizer:
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "20", "24", "2024"]
    merges = [("2", "0"), ("2", "4"), ("20", "24")]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
        if digits
        else plain
    )
    made.decoder = decoders.ByteLevel()
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return made


CASES: dict[str, tuple[str, Tokenizer, dict[str, Any], str]] = {
    "words": ("qwen2", word_level(), {"bos_token": "<s>", "eos_token": "</s>"}, "model WordLevel"),
    "digits": ("llama", byte_level(digits=True), {"tokenizer_class": "GPT2Tokenizer"}, "pre-token"),
    "case": (
        "gpt2",
        byte_level(lowercase=True),
        {"tokenizer_class": "GPT2Tokenizer"},
        "normalizer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_file(case: str, tmp_path: Path) -> None:
    model_type, made, config, difference = CASES[case]
    folder = folder_with(tmp_path / case, model_type, made, **config)
    loaded = load_tokenizer(folder)
    assert loaded.note is not None
    assert difference in loaded.note
    assert "--tokenizer class" in loaded.note
    assert "\n" not in loaded.note
    text = Text.load(folder, max_tokens=400)
    assert text.note == loaded.note
    for probe in (*PROBES, "w1 film 2024 W3", "GOOD good"):
        wanted = tuple(made.encode(probe, add_special_tokens=False).ids)
        assert text.tokenize_prompt(probe) == wanted, probe


def test_a_setting_serves_the_class_that_is_named(tmp_path: Path) -> None:
    model_type, made, config, _ = CASES["digits"]
    folder = folder_with(tmp_path, model_type, made, **config)
    named = AutoTokenizer.from_pretrained(str(folder))("2024").input_ids
    loaded = load_tokenizer(folder, "class")
    assert loaded.tokenizer("2024").input_ids == named == [259]
    assert loaded.note is not None
    assert "--tokenizer file" in loaded.note
    assert load_tokenizer(folder).tokenizer("2024").input_ids != named


def test_a_file_that_the_class_agrees_with_costs_no_word(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "gpt2", byte_level(), tokenizer_class="GPT2Tokenizer")
    loaded = load_tokenizer(folder)
    assert loaded.note is None
    assert type(loaded.tokenizer).__name__ == "GPT2Tokenizer"


def test_the_files_tokenizer_has_the_mask_that_the_class_knows(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "good"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([AddedToken(one, special=True) for one in pieces[:5]])
    loaded = load_tokenizer(folder_with(tmp_path, "bert", made, do_lower_case=True))
    assert loaded.note is not None
    assert loaded.tokenizer.mask_token_id == 4
    assert loaded.tokenizer.pad_token_id == 0
    assert loaded.tokenizer("FILM film").input_ids == made.encode("FILM film").ids


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "bert", "roberta", "gemma2", "llama"])
def test_a_folder_without_a_vocabulary_ends_the_start(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder_with(tmp_path, model_type, None))
    assert caught.value.code == "base_unusable"


def test_a_class_that_makes_no_tokens_ends_the_start(tmp_path: Path) -> None:
    model_type, made, config, _ = CASES["words"]
    folder = folder_with(tmp_path, model_type, made, **config)
    with pytest.raises(TokenizerError, match="no tokens") as caught:
        load_tokenizer(folder, "class")
    assert "--tokenizer file" in str(caught.value.fix)


def test_a_text_that_is_lost_in_tokenizing_is_refused(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "f", "i", "l", "m"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(one, special=True) for one in ("<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder = folder_with(tmp_path, "llama", made, bos_token="<s>", eos_token="</s>")
    text = Text.load(folder, max_tokens=20)
    assert text.tokenize_prompt("film") == (1, 3, 4, 5, 6)
    with pytest.raises(InvalidInput, match="left"):
        text.tokenize_prompt("2024")
    with pytest.raises(InvalidInput, match="Nothing of input 1"):
        text.tokenize(["film", "2024"], "text-classification")
    with pytest.raises(InvalidInput, match="left"):
        text.tokenize([("film", "2024")], "question-answering")
    assert text.tokenize_prompt("<s>") == (1, 1)
    assert text.tokenize_prompt("") == (1,)
