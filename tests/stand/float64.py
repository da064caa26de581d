"""Dense float64 answers: transformers' own task class with every adapted weight written out.

W ⊙ (1 + B A), or W + s B A, over the base's weights, which went through bitsandbytes and back where
the engine stores them so. It shares with the engine neither layers, nor batching, nor heads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import nn

from adapters.tasks import ROWS

# PEFT's word for a task, and the class of transformers that loads a model for it.
TASK_TYPES: dict[str, tuple[str | None, Any]] = {
    row.name: (row.task_type, getattr(transformers, row.auto_class or "AutoModel")) for row in ROWS
}
PREFIX = "base_model.model."


class Reference:
    """One adapter on the dense task model, in float64.

    Args:
        base: The base's folder.
        folder: The adapter's; None for the bare base.
        task: Which class; "" for the bare backbone.
        quantization: How the engine stores the linear layers of the backbone.
        quantize_embeddings: Whether the token embedding, and what is tied to it, is stored so too.
    """

    def __init__(
        self,
        base: Path,
        folder: Path | None,
        task: str,
        *,
        quantization: str = "none",
        quantize_embeddings: bool = False,
    ) -> None:
        labels = 0
        if folder is not None and task != "question-answering":
            labels = len(json.loads((folder / "config.json").read_text())["id2label"])
        self.model: Any = copy.deepcopy(
            _base(base, task or "feature-extraction", labels, quantization, quantize_embeddings)
        )
        if folder is not None:
            with torch.no_grad():
                self._merge(folder)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], type_ids: Sequence[int] | None = None) -> Any:
        """Of one text, alone and without padding."""
        more = {} if type_ids is None else {"token_type_ids": torch.tensor([type_ids])}
        return self.model(input_ids=torch.tensor([ids]), **more)

    def _merge(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        method = config["peft_type"].lower()
        for name, tensor in tensors.items():
            path = name.removeprefix(PREFIX)
            place, found, rest = path.partition(f".{method}_")
            if not found:
                _set(self.model, path.replace(".base_layer.", "."), tensor.double())
            elif "A" in rest.split(".")[0]:
                b = tensors[name.replace(f"_{rest}", f"_{rest.replace('A', 'B', 1)}")]
                scale = 1.0
                if method == "lora":
                    rank = tensor.shape[0]
                    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
                _modulate(self.model.get_submodule(place), method, tensor, b, scale)


def _modulate(layer: Any, method: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    rank = a.shape[0]
    delta = b.double().reshape(-1, rank) @ a.double().reshape(rank, -1)
    w0 = layer.weight.detach()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        delta = delta.T  # their tables are [rows, width] and [in, out]
    delta = delta.reshape(w0.shape)
    merged = w0 * (1 + delta) if method == "hira" else w0 + scale * delta
    layer.weight = nn.Parameter(merged)  # a tie to another layer ends here


def _set(model: nn.Module, path: str, tensor: torch.Tensor) -> None:
    place, _, name = path.rpartition(".")
    layer = model.get_submodule(place)
    assert getattr(layer, name).shape == tensor.shape
    setattr(layer, name, nn.Parameter(tensor))


@lru_cache(maxsize=64)
def _base(
    base: Path, task: str, labels: int, quantization: str, quantize_embeddings: bool
) -> nn.Module:
    _, factory = TASK_TYPES[task]
    more: dict[str, Any] = {"num_labels": labels} if labels else {}
    model: Any = factory.from_pretrained(
        base, dtype=torch.float64, attn_implementation="eager", **more
    )
    model.eval().requires_grad_(False)
    if quantization != "none":
        for module in model.base_model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = through(module.weight.data, quantization)
            elif type(module).__name__ == "Conv1D":
                module.weight.data = through(module.weight.data.T.contiguous(), quantization).T
        if quantize_embeddings:
            embedding = model.get_input_embeddings()
            embedding.weight.data = through(embedding.weight.data, quantization)
    return model  # type: ignore[no-any-return]


def through(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A weight as bitsandbytes gives it back after storing it, in float64."""
    if quantization == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        dense: torch.Tensor = values.double() * scales.double().unsqueeze(1) / 127
        return dense
    packed, state = functional.quantize_4bit(
        weight.float(), quant_type=quantization, compress_statistics=True
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state).double()
    return found
