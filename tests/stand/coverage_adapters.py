"""Adapters of every method, as PEFT saves them: random, pruned, or trained over 4-bit layers."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.stand import tiny_bases
from tests.stand.float64 import TASK_TYPES

# The columns: a task, and how the head's logits are read.
TASKS = {
    "text-classification": ("text-classification", None),
    "multi-label": ("text-classification", "multi_label_classification"),
    "regression": ("text-classification", "regression"),
    "token-classification": ("token-classification", None),
    "question-answering": ("question-answering", None),
    "fill-mask": ("fill-mask", None),
    "text-generation": ("text-generation", None),
    "feature-extraction": ("feature-extraction", None),
    "image-classification": ("image-classification", None),
}
LABELS = ("one", "two", "three")
RANK = 4
SPARSITY = 0.5


def make(folder: Path, base: Path, column: str, method: str, targets: Sequence[str]) -> Path:
    """One adapter as PEFT saves it; a QLoRA one is trained on the base in NF4."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    task, problem = TASKS[column]
    seed = zlib.crc32(f"{base.name} {folder.name}".encode())  # the same in any order of stages
    torch.manual_seed(seed)
    task_type, factory = TASK_TYPES[task]
    config = AutoConfig.from_pretrained(base)
    config.num_labels = 1 if problem == "regression" else len(LABELS)
    if task == "question-answering":
        config.num_labels = 2
    elif problem != "regression":
        config.id2label = dict(enumerate(LABELS))
    config.problem_type = problem
    heads = tiny_bases.heads_of(config.model_type, task)
    options: dict[str, Any] = {
        "r": RANK, "target_modules": list(targets), "modules_to_save": heads,
        "task_type": task_type,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on Conv1D and on tied weights
        if method == "QLoRA":
            model = _trained_on_nf4(base, config, factory, LoraConfig(**options, lora_alpha=8))
        else:
            made = factory.from_config(config)
            chosen = HiraConfig(**options) if method == "HiRA" else LoraConfig(**options)
            model = get_peft_model(made, chosen)
            _fill(model, method)
        # Without a copy of the base's embedding beside the factors.
        model.save_pretrained(folder, save_embedding_layers=False)
    config.save_pretrained(folder)
    if method == "sparse LoRA":
        prune(folder / "adapter_model.safetensors")
    return folder


def _fill(model: Any, method: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name or "lora_" in name:
                parameter.normal_(0.0, 0.45 if method == "HiRA" else 0.12)
            elif "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)


def _trained_on_nf4(base: Path, config: Any, factory: Any, chosen: Any) -> Any:
    """A few steps of AdamW on the factors and the head, over bitsandbytes' own 4-bit layers."""
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig

    outside = tiny_bases.heads_of(config.model_type, "text-classification") or []
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[
            *outside, "classifier", "qa_outputs", "lm_head", "cls", "vocab_projector",
            "vocab_transform", "score",
            "pooler",  # where the checkpoint has none it would be left without weights
        ],
    )  # fmt: skip
    model = factory.from_pretrained(
        base, config=config, quantization_config=quantized, dtype=torch.float32,
        device_map={"": "cpu"},
    )  # fmt: skip
    adapted = get_peft_model(model, chosen)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    adapted.train()
    sees = config.model_type == "vit"
    for _ in range(2):
        inputs = (
            {"pixel_values": torch.rand(2, 3, tiny_bases.IMAGE_SIDE, tiny_bases.IMAGE_SIDE)}
            if sees
            else {"input_ids": torch.randint(5, tiny_bases.VOCABULARY, (2, 8))}
        )
        loss = adapted(**inputs)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def prune(path: Path, share: float = SPARSITY) -> None:
    """Set the smallest numbers of every factor to zero, by magnitude."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".lora_" in name:
            least = tensor.abs().flatten().kthvalue(int(tensor.numel() * share)).values
            tensors[name] = torch.where(tensor.abs() <= least, 0.0, tensor)
    save_file(tensors, path, {"format": "pt"})
