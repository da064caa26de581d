"""Adapter folders for tests: some made by PEFT itself on tiny models, some made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
)

from adapters.intake.checkpoint import CONFIG_FILE
from adapters.intake.safetensors_header import TENSOR_FILE
from adapters.signature import BaseSignature, describe

SMALL: Mapping[str, Any] = {
    "vocab_size": 64,
    "dim": 64,
    "hidden_dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 32,
}


def small_base() -> BaseSignature:
    """The signature of the DistilBERT that ``hira_folder`` adapts."""
    with torch.device("meta"):
        return describe(DistilBertForMaskedLM(DistilBertConfig(**SMALL)), "small-distilbert")


def save_with_peft(model: nn.Module, config: Any, folder: Path, *, seed: int = 0) -> Path:
    """Adapt ``model`` with PEFT, fill A and B with random numbers, and save the adapter."""
    from peft import get_peft_model

    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "hira_" in name or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(str(folder))
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def hira_folder(folder: Path, *, rank: int = 4, labels: int = 2, seed: int = 0) -> Path:
    """A HiRA classifier for ``small_base``, made by PEFT."""
    from peft.tuners.hira import HiraConfig

    torch.manual_seed(seed)
    model = DistilBertForSequenceClassification(DistilBertConfig(**SMALL, num_labels=labels))
    config = HiraConfig(
        r=rank,
        target_modules=["q_lin", "v_lin"],
        modules_to_save=["pre_classifier", "classifier"],
        task_type="SEQ_CLS",
    )
    return save_with_peft(model, config, folder, seed=seed)


def lora_folder(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A LoRA classifier for ``small_base``, made by PEFT."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    model = DistilBertForSequenceClassification(DistilBertConfig(**SMALL))
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_lin", "v_lin"],
        modules_to_save=["pre_classifier", "classifier"],
        task_type="SEQ_CLS",
        **options,
    )
    return save_with_peft(model, config, folder, seed=seed)


def change_config(folder: Path, **changes: Any) -> Path:
    """Set keys of ``adapter_config.json``."""
    path = folder / CONFIG_FILE
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return folder


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """Replace or add tensors by name; None takes one out."""
    tensors = load_file(folder / TENSOR_FILE)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / TENSOR_FILE)
    return folder


def first_tensor(folder: Path, ending: str) -> tuple[str, torch.Tensor]:
    """The first tensor whose name ends so."""
    tensors = load_file(folder / TENSOR_FILE)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    return name, tensors[name]
