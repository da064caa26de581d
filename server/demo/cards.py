"""Writes the model cards of the demo: what the saved tensors show, and what was measured.

Nothing in a card is typed in by hand that could be counted or measured: sizes come from the files,
ranks and parameter counts from the tensors, scores from `server.demo.scores`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import safe_open

from server.demo.recipes import TARGETS, ClassifierRecipe, Recipe, WriterRecipe
from server.demo.scores import ClassifierScore, WriterScore
from server.demo.served_base import BASE_NAME
from server.demo.vocabulary import CONTEXT_TOKENS, VOCABULARY_TOKENS

CARD_NAME: Final = "README.md"
_FACTOR_MARKS: Final = ("hira_A", "hira_B", "lora_A", "lora_B")
_FIRST_FACTOR_MARKS: Final = ("hira_A", "lora_A")

_SOURCES: Final = (
    (
        "IMDB, Large Movie Review Dataset (Maas et al. 2011)",
        "8,000 reviews of the official train, HTML line breaks turned into line breaks",
        "none stated; citation asked for; the reviews are their writers'",
    ),
    (
        "SST-2 (Socher et al. 2013; GLUE)",
        "55,438 sentences and phrases of train",
        "none stated",
    ),
    (
        "AG News (Zhang et al. 2015)",
        "9,991 descriptions of the official train",
        "research and other non-commercial use",
    ),
    (
        "WikiText-103 (Merity et al. 2016)",
        "nine tenths of its first 162 articles, spacing made ordinary, `<unk>` left out",
        "CC BY-SA",
    ),
    ("tiny Shakespeare", "the first nine tenths", "public domain"),
)


@dataclass(frozen=True)
class TensorCount:
    """What a safetensors file holds, counted."""

    file_bytes: int
    parameters: int
    factor_parameters: int
    adapted_layers: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]


def count_tensors(path: Path) -> TensorCount:
    """Read the header of a safetensors file and count what is in it."""
    parameters = factors = 0
    ranks: Counter[int] = Counter()
    dtypes: set[str] = set()
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
            part = tensors.get_slice(name)
            shape = part.get_shape()
            size = 1
            for length in shape:
                size *= length
            parameters += size
            dtypes.add(part.get_dtype())
            if any(mark in name for mark in _FACTOR_MARKS):
                factors += size
            if any(mark in name for mark in _FIRST_FACTOR_MARKS):
                ranks[shape[0]] += 1
    return TensorCount(
        file_bytes=path.stat().st_size,
        parameters=parameters,
        factor_parameters=factors,
        adapted_layers=ranks.total(),
        ranks=tuple(sorted(ranks)),
        dtypes=tuple(sorted(dtypes)),
    )


def write_base_card(
    base_dir: Path, scores: dict[str, tuple[WriterScore, WriterScore]], *, steps: int, tokens: int
) -> None:
    """Write the card of the base; `scores` holds, by source, the plain and the 4-bit score."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    counted = count_tensors(base_dir / "model.safetensors")
    rows = []
    for source, (plain, four_bit) in scores.items():
        counts = (f"{plain.documents:,}", f"{plain.tokens:,}")
        dense = (f"{plain.perplexity:.2f}", f"{plain.bits_per_character:.3f}")
        packed = (f"{four_bit.perplexity:.2f}", f"{four_bit.bits_per_character:.3f}")
        rows.append((source, *counts, *dense, *packed))
    measures = ("perplexity", "bits per character")
    heads = ("source", "documents", "tokens", *measures, *(f"{name}, 4 bits" for name in measures))
    scored = _table(heads, rows)
    licences = ("source", "part used", "licence, as far as its authors state one")
    card = f"""\
---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [llama, demo]
---
# {BASE_NAME}

A small Llama, trained from nothing, that a 4-bit server can hold in a few megabytes. It exists so
that the server runs, answers and is tested without a download. The adapters beside it are trained
on it.

## What it is
- {counted.parameters:,} parameters in {", ".join(counted.dtypes)}, {counted.file_bytes:,} bytes.
- {config["num_hidden_layers"]} layers of width {config["hidden_size"]},
  {config["num_attention_heads"]} query heads over {config["num_key_value_heads"]} key-value heads
  of {config["head_dim"]}, feed-forward width {config["intermediate_size"]}, input and output
  embeddings tied.
- Context: {CONTEXT_TOKENS} tokens.
- Vocabulary: {VOCABULARY_TOKENS:,} tokens, byte-level BPE learned from the same training texts.
  `<pad>` is {config["pad_token_id"]}; `<s>` is {config["bos_token_id"]} and opens every encoded
  text; `</s>` is {config["eos_token_id"]} and closes a document.

## What it was trained on
Next-token prediction on texts alone; no label was part of any text.
{steps:,} steps, {tokens:,} tokens.

{_table(licences, _SOURCES)}

## What was measured
On texts that no training step saw, in bfloat16 on a CPU; "4 bits" is NF4 with blocks of 64 and
double quantization on every linear layer of the backbone, as the adapters meet it. Perplexity is
per token of this model's own vocabulary, so compare models by bits per character.

{scored}

## What it is not for
It knows no facts, follows no instructions and speaks only English. What it writes has the form of
its sources and not their sense, and carries whatever bias they have. Use it to try, test and
measure the server; given the terms of the sources above, for nothing commercial.

## How it was made
`python -m server.demo.train base --data DIR`, from `server/demo/train.py`.
"""
    (base_dir / CARD_NAME).write_text(card, encoding="utf-8")


def write_classifier_card(
    adapter_dir: Path, recipe: ClassifierRecipe, scores: dict[str, ClassifierScore]
) -> None:
    """Write the card of a classifier; `scores` is keyed by the form the texts were given in."""
    scored = _table(
        ("texts", "rows", "accuracy", "macro F1"),
        [
            (form, f"{score.rows:,}", f"{score.accuracy:.4f}", f"{score.macro_f1:.4f}")
            for form, score in scores.items()
        ],
    )
    labels = ", ".join(f"{index} `{label}`" for index, label in enumerate(recipe.labels))
    passes = "1 pass" if recipe.epochs == 1 else f"{recipe.epochs} passes"
    notes = ""
    if recipe.window_tokens < CONTEXT_TOKENS:
        notes += f"\nOf a longer text each pass saw a stretch of {recipe.window_tokens} tokens."
    if recipe.html:
        notes += "\nA review kept its HTML line breaks or lost them, by chance."
    body = f"""\
## What it does
{recipe.summary} Labels: {labels}; `config.json` names them.
The answer is read from the last token by the head `score`, which is saved with the adapter.
Longer texts are cut after {CONTEXT_TOKENS} tokens.

## What it was trained on
{recipe.sources}; {passes} in batches of {recipe.batch_rows}, step size
{recipe.learning_rate:g}.{notes}

## What was measured
On {recipe.held_out}, which no training step saw; adapter loaded from this folder onto the 4-bit
base, bfloat16 on a CPU.

{scored}

## What it is not for
It knows {len(recipe.labels)} answers and gives one of them to any text, whatever it is about. It
was made to try and to test a server.
"""
    _write_adapter_card(adapter_dir, recipe, "text-classification", body)


def write_writer_card(
    adapter_dir: Path, recipe: WriterRecipe, adapted: WriterScore, base: WriterScore
) -> None:
    """Write the card of a generation adapter beside what the 4-bit base alone scores."""
    scored = _table(
        ("model", "perplexity per token", "bits per character"),
        [
            (name, f"{score.perplexity:.2f}", f"{score.bits_per_character:.3f}")
            for name, score in (("base alone, 4 bits", base), ("with this adapter", adapted))
        ],
    )
    body = f"""\
## What it does
{recipe.summary}

## What it was trained on
{recipe.sources}; {recipe.steps} steps of 4,096 tokens, step size {recipe.learning_rate:g}.

## What was measured
On {recipe.held_out}, which no training step saw, neither of this adapter nor of the base; adapter
loaded from this folder onto the 4-bit base, bfloat16 on a CPU; {adapted.documents:,} passages,
{adapted.tokens:,} tokens.

{scored}

## What it is not for
It has the form of its source and little of its sense, and states no facts. It was made to try and
to test a server.
"""
    _write_adapter_card(adapter_dir, recipe, "text-generation", body)


def _write_adapter_card(adapter_dir: Path, recipe: Recipe, pipeline: str, body: str) -> None:
    counted = count_tensors(adapter_dir / "adapter_model.safetensors")
    head = counted.parameters - counted.factor_parameters
    ranks = ", ".join(map(str, counted.ranks))
    names = {"hira": "HiRA", "lora": "LoRA"}
    terms = {"hira": "W0 ⊙ (1 + B A)", "lora": "W0 + 2 B A"}
    card = f"""\
---
base_model: {BASE_NAME}
library_name: peft
pipeline_tag: {pipeline}
language: en
tags: [{recipe.method}, demo]
---
# {recipe.name}

{body}
## What is in the file
- Method: {names[recipe.method]}, `W' = {terms[recipe.method]}`. Rank: {ranks}.
- Adapted layers: {counted.adapted_layers} ({", ".join(f"`{target}`" for target in TARGETS)}).
- Trainable parameters: {counted.parameters:,} ({counted.factor_parameters:,} in the factors,
  {head:,} in the head), {", ".join(counted.dtypes)}, {counted.file_bytes:,} bytes.
- Base: `{BASE_NAME}` with its linear layers in NF4, blocks of 64, double quantization; trained on
  just those weights.

## How it was made
`python -m server.demo.train adapter {recipe.name} --data DIR`, from `server/demo/train.py`.
"""
    (adapter_dir / CARD_NAME).write_text(card, encoding="utf-8")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
