"""Measures the demo's models on texts they did not learn from; saves nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from server.demo.corpora import LabelledTexts
from server.demo.recipes import ClassifierRecipe, WriterRecipe
from server.demo.served_base import load_classifier, load_language_model, load_tokenizer
from server.demo.vocabulary import CONTEXT_TOKENS

_BATCH_TOKENS: Final = 8192
_IGNORED_TARGET: Final = -100


@dataclass(frozen=True)
class ClassifierScore:
    """Accuracy and macro-averaged F1 over the rows of a test set."""

    accuracy: float
    macro_f1: float
    rows: int


@dataclass(frozen=True)
class WriterScore:
    """Perplexity per token, bits per character, and how much text they were taken over."""

    perplexity: float
    bits_per_character: float
    documents: int
    tokens: int


def classifier_score(
    recipe: ClassifierRecipe, rows: LabelledTexts, base_dir: Path, adapter_dir: Path
) -> ClassifierScore:
    """Load the saved adapter on a fresh 4-bit base in bfloat16 and classify every row."""
    tokenizer = load_tokenizer(base_dir)
    base = load_classifier(base_dir, recipe.labels, torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    encoded = tokenizer(list(rows.texts), truncation=True, max_length=CONTEXT_TOKENS)["input_ids"]
    predicted = np.zeros(len(rows), dtype=np.int64)
    with torch.inference_mode():
        for chosen in _batches([len(ids) for ids in encoded]):
            padded = tokenizer.pad(
                {"input_ids": [encoded[row] for row in chosen]}, return_tensors="pt"
            )
            predicted[chosen] = model(**padded).logits.argmax(-1).numpy()
    labels = np.array(rows.labels)
    f1 = [_f1(predicted == index, labels == index) for index in range(len(recipe.labels))]
    return ClassifierScore(float((predicted == labels).mean()), float(np.mean(f1)), len(rows))


def writer_score(
    recipe: WriterRecipe, documents: Sequence[str], base_dir: Path, adapter_dir: Path
) -> WriterScore:
    """Load the saved adapter on a fresh 4-bit base in bfloat16 and score every document."""
    base = load_language_model(base_dir, torch.bfloat16, quantized=True)
    model: Any = PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    return language_score(model, load_tokenizer(base_dir), documents)


def base_score(base_dir: Path, documents: Sequence[str], *, quantized: bool) -> WriterScore:
    """Score every document with the base alone, in bfloat16."""
    model = load_language_model(base_dir, torch.bfloat16, quantized=quantized).eval()
    return language_score(model, load_tokenizer(base_dir), documents)


def language_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> WriterScore:
    """Return what the model makes of `<s> document </s>`, long documents cut into whole contexts.

    Every token but `<s>` is predicted once; the first token of a later piece is predicted from the
    last token of the piece before. Bits per character divides the same total by the characters.
    """
    pieces: list[list[int]] = []
    for ids in tokenizer(list(documents), verbose=False)["input_ids"]:
        closed = [*ids, tokenizer.eos_token_id]
        starts = range(0, len(closed) - 1, CONTEXT_TOKENS)
        pieces.extend(closed[start : start + CONTEXT_TOKENS + 1] for start in starts)
    total_nats, tokens = 0.0, 0
    with torch.inference_mode():
        for chosen in _batches([len(piece) for piece in pieces]):
            width = max(len(pieces[index]) for index in chosen)
            ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
            targets = torch.full((len(chosen), width), _IGNORED_TARGET)
            for row, index in enumerate(chosen):
                piece = torch.tensor(pieces[index])
                ids[row, : len(piece)] = piece
                targets[row, 1 : len(piece)] = piece[1:]
            logits = model(input_ids=ids[:, :-1]).logits.float()
            nats = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
            total_nats += nats.item()
            tokens += int((targets[:, 1:] != _IGNORED_TARGET).sum())
    bits = total_nats / math.log(2)
    characters = sum(map(len, documents))
    return WriterScore(math.exp(total_nats / tokens), bits / characters, len(documents), tokens)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group indices by similar length so that rows times width stays near the token budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= _BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    hits = int((predicted & actual).sum())
    return 2 * hits / max(1, int(predicted.sum()) + int(actual.sum()))
