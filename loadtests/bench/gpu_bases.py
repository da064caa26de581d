"""Bases of random numbers for the benches of a GPU: a Llama in NF4 and its adapters, in a folder.

The base is quantized in place and written as it is then, so a large one is never written whole nor
quantized twice; the stock peers compute with the same codes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.registry.store import Store
from adapters.signature import BaseSignature, describe
from loadtests.bench.generation import LABELS, save_base
from loadtests.bench.modulation import LLAMA_TARGETS, RANK, random_factors
from loadtests.bench.peers import nf4_options, quantize

FEW_RANK = 8


@dataclass(frozen=True, slots=True)
class StepGoals:
    """What is asked of one shape, as speeds; None: nothing.

    Args:
        usual: Of a step of the usual batch, against the earlier path.
        many, one: Likewise, of a full batch and of one sequence.
        generate: Of the usual batch against transformers' ``generate`` on the bitsandbytes base.
        busy: Share of a step in which the card computes.
        prompts: Of prompts, against the earlier path.
        adapters, few_rank: Of adapters of rank 32 and 8 against the bare base in the same engine.
    """

    usual: float
    many: float | None = None
    one: float | None = None
    generate: float = 4.0
    busy: float = 0.9
    prompts: float = 5.0
    adapters: float = 0.6
    few_rank: float = 0.8


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama of random numbers."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    tied: bool
    goals: StepGoals = field(default_factory=lambda: StepGoals(1.0))
    max_sequences: int = 64
    kv_bytes: int = 4 << 30


SHAPES = (
    Shape("1.2 B", 2048, 8192, 16, 32, 8, tied=True, goals=StepGoals(1 / 0.2)),
    Shape("8 B", 4096, 14336, 32, 32, 8, tied=False, goals=StepGoals(1 / 0.3, 5.0, 5.0)),
)


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A base in a folder, and its adapters in a store and in folders.

    Args:
        root: Of all of it.
        base: The folder of the base.
        folders: Adapters of rank 32.
        versions: The same in the store.
        few_rank: Versions of adapters of rank 8.
        classifier: An adapter that classifies texts.
    """

    root: Path
    base: Path
    folders: tuple[Path, ...]
    versions: tuple[str, ...]
    few_rank: tuple[str, ...]
    classifier: Path


def random_llama(shape: Shape, device: torch.device, vocabulary: int) -> Any:
    """transformers' model of this shape in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@contextmanager
def stored(
    model: Any, shape: Shape, device: torch.device, *, adapters: int, few_rank: int
) -> Iterator[StoredBase]:
    """Quantize a model in place and write it, and so many adapters of each rank, to a folder that
    is gone afterwards."""
    signature = describe(model, "base")
    quantize(model, device)
    options = nf4_options()
    options.llm_int8_skip_modules = ["lm_head"]
    with tempfile.TemporaryDirectory(prefix="hira-gpu-") as name:
        root = Path(name)
        base = root / "base"
        save_base(model, base, weights=False)
        described = json.loads((base / "config.json").read_text(encoding="utf-8"))
        described["quantization_config"] = options.to_dict()
        described["dtype"] = "bfloat16"
        (base / "config.json").write_text(json.dumps(described), encoding="utf-8")
        tensors = {key: one.contiguous() for key, one in model.state_dict().items()}
        if shape.tied:
            tensors.pop("lm_head.weight")
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        del tensors
        folders = [
            write_adapter(root / f"a{n}", signature, LLAMA_TARGETS, seed=n, device=device)
            for n in range(adapters)
        ]
        few = [
            write_adapter(
                root / f"few{n}", signature, LLAMA_TARGETS, seed=n, rank=FEW_RANK, device=device
            )
            for n in range(few_rank)
        ]
        classifier = write_adapter(
            root / "classifier", signature, LLAMA_TARGETS[:1], seed=0, device=device,
            head={"score": False}, model_type="llama",
        )  # fmt: skip
        store = Store(root / "store")
        yield StoredBase(
            root,
            base,
            tuple(folders),
            tuple(store.add(one) for one in folders),
            tuple(store.add(one) for one in few),
            classifier,
        )


def write_adapter(
    folder: Path,
    signature: BaseSignature,
    targets: Sequence[str],
    *,
    seed: int,
    device: torch.device,
    rank: int = RANK,
    head: dict[str, bool] | None = None,
    model_type: str = "",
) -> Path:
    """A folder of HiRA factors as PEFT saves them.

    Args:
        folder: Made.
        signature: Of the base.
        targets: Layers, by the last word of their paths.
        seed: Of its numbers.
        device: That makes them.
        rank: Of all layers.
        head: With it the adapter classifies: its modules, and whether they have a bias.
        model_type: Of the base, where it classifies.
    """
    tensors: dict[str, torch.Tensor] = {}
    factors = random_factors(signature, tuple(targets), seed, rank=rank, device=device)
    for path, entry in factors.items():
        tensors[f"base_model.model.{path}.hira_A"] = entry.a.cpu()
        tensors[f"base_model.model.{path}.hira_B"] = entry.b.cpu()
    folder.mkdir()
    if head:
        width = signature.hidden_size
        for module, has_bias in head.items():
            tensors[f"base_model.model.{module}.weight"] = torch.randn(len(LABELS), width) * 0.02
            if has_bias:
                tensors[f"base_model.model.{module}.bias"] = torch.randn(len(LABELS))
        task = {
            "model_type": model_type,
            "id2label": dict(enumerate(LABELS)),
            "num_labels": len(LABELS),
            "problem_type": "single_label_classification",
        }
        (folder / "config.json").write_text(json.dumps(task), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    described = {
        "peft_type": "HIRA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "target_modules": list(targets),
        "modules_to_save": list(head) if head else None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder
