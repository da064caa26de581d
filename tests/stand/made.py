"""Adapters made on the spot for the demo base: random factors, and a head where it is needed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.demo import BASE_DIR

TARGETS = ("q_proj", "v_proj")


def demo_config() -> dict[str, int]:
    config: dict[str, int] = json.loads((BASE_DIR / "config.json").read_text())
    return config


def make_adapter(
    folder: Path,
    *,
    seed: int,
    labels: tuple[str, ...] = (),
    rank: int = 4,
    method: str = "HIRA",
    scale: float = 0.5,
) -> Path:
    """Write a PEFT adapter folder for the demo base.

    Args:
        folder: Made here.
        seed: Of the random numbers.
        labels: With labels it classifies texts, without it generates.
        rank: Of every factor pair.
        method: HIRA or LORA.
        scale: Of B; the larger, the more the adapter changes.
    """
    config = demo_config()
    width = config["hidden_size"]
    heads = config["head_dim"]
    outs = {
        "q_proj": config["num_attention_heads"] * heads,
        "v_proj": config["num_key_value_heads"] * heads,
    }
    generator = torch.Generator().manual_seed(seed)
    kind = "hira" if method == "HIRA" else "lora"
    ends = ("hira_A", "hira_B") if method == "HIRA" else ("lora_A.weight", "lora_B.weight")
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            path = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            a = torch.randn(rank, width, generator=generator)
            b = torch.randn(outs[target], rank, generator=generator)
            tensors[f"{path}.{ends[0]}"] = a
            tensors[f"{path}.{ends[1]}"] = b * scale / rank
    folder.mkdir(parents=True)
    if labels:
        head = torch.randn(len(labels), width, generator=generator)
        tensors["base_model.model.score.weight"] = head
        task = {
            "model_type": "llama",
            "id2label": dict(enumerate(labels)),
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
        }
        (folder / "config.json").write_text(json.dumps(task))
    described = {
        "peft_type": method,
        "task_type": "SEQ_CLS" if labels else "CAUSAL_LM",
        "base_model_name_or_path": "hira-demo-base",
        "r": rank,
        "target_modules": list(TARGETS),
        "modules_to_save": ["score"] if labels else None,
        "inference_mode": True,
    }
    if kind == "lora":
        described |= {"lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
