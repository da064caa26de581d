"""Loads the demo's base as a server would hold it: every backbone linear layer through 4 bits.

The weights come back dense, so that PEFT's ordinary layers can train on them, but their values are
the ones a 4-bit server multiplies with. An adapter trained here therefore meets the base it was
trained on.
"""

from pathlib import Path
from typing import Final

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BASE_NAME: Final = "hira-demo-base"
_BLOCK_WEIGHTS: Final = 64


def load_tokenizer(base_dir: Path) -> PreTrainedTokenizerFast:
    """Return the base's tokenizer."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(base_dir)
    return tokenizer


def load_language_model(base_dir: Path, dtype: torch.dtype, *, quantized: bool) -> PreTrainedModel:
    """Return the base with its language-model head."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    return _through_four_bits(model) if quantized else model


def load_classifier(base_dir: Path, labels: tuple[str, ...], dtype: torch.dtype) -> PreTrainedModel:
    """Return the base under a fresh `score` head whose config names the labels."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base_dir,
        dtype=dtype,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    return _through_four_bits(model)


def nf4_round_trip(weight: Tensor) -> Tensor:
    """Return `dequantize(quantize(weight))` in bfloat16, doubly quantized in blocks of 64; pure."""
    packed, state = quantize_4bit(
        weight.detach().to(torch.bfloat16),
        blocksize=_BLOCK_WEIGHTS,
        compress_statistics=True,
        quant_type="nf4",
    )
    dense: Tensor = dequantize_4bit(packed, state)
    return dense


def _through_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, the weight of every linear layer of the backbone; heads are left alone."""
    backbone = model.base_model
    with torch.no_grad():
        for layer in backbone.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(nf4_round_trip(layer.weight))
    return model
