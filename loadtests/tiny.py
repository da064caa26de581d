"""A base of two small layers and random HiRA classifiers for it, made on the spot.

Its forward costs next to nothing, so that a load test on a small machine can compare many answers:
what is tried are names, versions, batches and slots, not arithmetic. The tokenizer is that of the
demo base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

DEMO_BASE_DIR = Path(__file__).parents[1] / "server" / "demo" / "base"
VOCABULARY = 6144
WIDTH = 64
LAYERS = 2
RANK = 4
TARGETS = ("q_proj", "o_proj")  # square ones
LABELS = ("LOW", "MIDDLE", "HIGH")


def make_base(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Llama that the demo base's tokenizer fits; returns its folder.

    Args:
        folder: Made here.
        seed: Of its weights, which are float32 and differ clearly from text to text.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_BASE_DIR / name, folder / name)
    return folder


def make_classifier(folder: Path, *, seed: int) -> Path:
    """Write a random HiRA classifier for `make_base`, as PEFT saves one; returns its folder."""
    described = {
        "peft_type": "HIRA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "target_modules": list(TARGETS),
        "modules_to_save": ["score"],
        "inference_mode": True,
    }
    task = {
        "model_type": "llama",
        "id2label": dict(enumerate(LABELS)),
        "problem_type": "single_label_classification",
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(task))
    return renumber(folder, seed=seed)


def renumber(folder: Path, *, seed: int) -> Path:
    """Write the numbers of ``seed`` into a folder that `make_classifier` made; returns it."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for target in TARGETS:
            path = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{path}.hira_A"] = torch.randn(RANK, WIDTH, generator=generator)
            tensors[f"{path}.hira_B"] = torch.randn(WIDTH, RANK, generator=generator) / RANK
    head = torch.randn(len(LABELS), WIDTH, generator=generator) / 4
    tensors["base_model.model.score.weight"] = head
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
