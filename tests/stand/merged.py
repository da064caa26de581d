"""The oracle of whole models: one float64 model per adapter, its weights merged densely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes import functional
from torch import nn

from adapters.kernels.reference import modulated_weight
from adapters.modulation.slot_factors import SlotFactors
from tests.stand.tiny_models import Quantization, build


def merged_model(
    name: str,
    factors: Mapping[str, SlotFactors],
    *,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """``build(name)`` in float64, each weight as bitsandbytes dequantizes it, times 1 + BA."""
    quantized = build(name, quantization=quantization, dtype=dtype)
    model = build(name, dtype=dtype).double()
    for path, module in quantized.named_modules():
        kind = type(module).__name__
        if kind in ("Linear4bit", "Linear8bitLt"):
            dense: Any = _dense(module)
            target: Any = model.get_submodule(path)
            is_conv1d = type(target).__name__ == "Conv1D"
            target.weight = nn.Parameter((dense.t() if is_conv1d else dense).double())
    for path, entry in factors.items():
        target = model.get_submodule(path)
        # Embeddings are stored [rows, dim] where A is [r, rows], Conv1D [in, out]: transposed.
        transposed = isinstance(target, nn.Embedding) or type(target).__name__ == "Conv1D"
        w0 = target.weight.detach()
        w0 = w0.t() if transposed else w0
        merged = modulated_weight(w0, entry.method, entry.a, entry.b, entry.scale)
        # A new parameter: a tie to another layer ends here, as for an adapter on one of the two.
        target.weight = nn.Parameter(merged.t() if transposed else merged)
        if entry.bias is not None:
            target.bias = nn.Parameter(entry.bias.double())
    return model.eval()


def merged_outputs(
    name: str,
    adapters: Sequence[Mapping[str, SlotFactors]],
    inputs: torch.Tensor,
    *,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Row i of ``inputs`` through the model merged with ``adapters[i]``: float64."""
    outputs = []
    for row, factors in enumerate(adapters):
        model = merged_model(name, factors, quantization=quantization, dtype=dtype)
        outputs.append(model(inputs[row : row + 1])[0])
    return torch.cat(outputs)


def _dense(module: Any) -> torch.Tensor:
    if type(module).__name__ == "Linear4bit":
        state = module.weight.quant_state
        state.dtype = torch.float32
        return functional.dequantize_4bit(module.weight.data.clone(), state)  # type: ignore[no-any-return]
    scales = module.weight.SCB.double().unsqueeze(1)
    return module.weight.data.double() * scales / 127  # type: ignore[no-any-return]
