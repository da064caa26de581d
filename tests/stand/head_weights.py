"""Adapters whose tensors are a head for a tiny DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DistilBertConfig

from adapters.intake.checkpoint import AdapterWeights
from adapters.intake.config import parse_config
from adapters.intake.model_config import Labels

DISTILBERT = DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=50)

HEAD = {
    "pre_classifier.weight": torch.zeros(32, 32),
    "pre_classifier.bias": torch.zeros(32),
    "classifier.weight": torch.zeros(2, 32),
    "classifier.bias": torch.zeros(2),
}


def weights(
    head_config: Mapping[str, Any] | None = None, **head: torch.Tensor | None
) -> AdapterWeights:
    """An adapter with ``HEAD``, changed; dots in names are written as two underscores."""
    changed = {**HEAD, **{name.replace("__", "."): tensor for name, tensor in head.items()}}
    return AdapterWeights(
        config=parse_config(b'{"peft_type": "HIRA", "r": 2, "target_modules": ["q_lin"]}'),
        factors={},
        head={name: tensor for name, tensor in changed.items() if tensor is not None},
        labels=Labels(("a", "b"), None),
        task="text-classification",
        head_config=head_config or {},
    )
