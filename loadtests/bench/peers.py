"""What the modulation is measured against, each as fast as its own settings make it.

- bitsandbytes' 4-bit base without adapters, in both of its layouts: packed for the CPU, which its
  forward makes in place for bfloat16, and plain, which it dequantizes. The faster one counts.
- PEFT: ``set_adapter`` between the sub-batches of single adapters, on the 4-bit base. Packing is
  off, or its answers would be wrong, and it computes in the dtype of the base throughout.
- One merged dense model per adapter.

Scales of 4-bit weights are float32, which spares both peers the second dequantization.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors

Factors = Mapping[str, SlotFactors]
_QUANT_TYPE = "nf4"


def quiet() -> None:
    """Keep advice of the libraries out of the report."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|bitsandbytes)\b")


def quantized(dense: nn.Module) -> nn.Module:
    """A copy with every linear layer but the output layer in bitsandbytes' NF4, not packed."""
    return quantize(copy.deepcopy(dense), torch.device("cpu"))


def quantize(model: nn.Module, device: torch.device) -> nn.Module:
    """As ``quantized``, the model itself, layer by layer on ``device``."""
    import bitsandbytes as bnb

    output = output_layer(model)
    for path, module in list(model.named_modules()):
        if module is output or type(module) is not nn.Linear:
            continue
        layer: Any = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=module.weight.dtype,
            compress_statistics=False,
            quant_type=_QUANT_TYPE,
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.detach(),
            requires_grad=False,
            quant_type=_QUANT_TYPE,
            compress_statistics=False,
            module=layer,
        ).to(device)
        layer.bias = module.bias
        model.set_submodule(path, layer)
    model.requires_grad_(False)
    return model.eval()


def nf4_options(dtype: torch.dtype = torch.bfloat16) -> Any:
    """transformers' setting for a base in NF4 that computes in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def output_layer(model: Any) -> nn.Module | None:
    """The language-model head, if there is one."""
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def set_packing(model: nn.Module, packs: bool) -> None:
    """Let bitsandbytes repack the weights in its next forward, or keep it from that."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = packs  # type: ignore[assignment]


def layouts(dense: nn.Module) -> dict[str, nn.Module]:
    """The 4-bit base in each layout that this processor has, by the layout's name."""
    from bitsandbytes.functional import has_avx512bf16

    found = {"plain": quantized(dense)}
    set_packing(found["plain"], False)
    if has_avx512bf16() and next(dense.parameters()).dtype == torch.bfloat16:
        found["packed"] = quantized(dense)
        set_packing(found["packed"], True)
    return found


def peft_model(dense: nn.Module, adapters: Sequence[Factors], targets: Sequence[str]) -> Any:
    """The 4-bit base under PEFT with all ``adapters``, named "0", "1", ... in order."""
    import peft

    base: Any = quantized(dense)
    return with_peft(
        base,
        lambda: peft.get_peft_model(
            base, _config(adapters[0], targets), adapter_name="0", autocast_adapter_dtype=False
        ),
        adapters,
        targets,
    )


def with_peft(
    base: Any, wrap: Callable[[], Any], adapters: Sequence[Factors], targets: Sequence[str]
) -> Any:
    """Wrap a quantized base and fill in the factors."""
    prepare_for_peft(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it comments on tied weights
        wrapped = wrap()
        for number, factors in enumerate(adapters[1:], start=1):
            config = _config(factors, targets)
            wrapped.add_adapter(str(number), config, autocast_adapter_dtype=False)
    modules = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for number, factors in enumerate(adapters):
            for path, entry in factors.items():
                module: Any = modules[path]
                module.hira_A[str(number)].data = entry.a.clone()
                module.hira_B[str(number)].data = entry.b.clone()
    return wrapped.eval()


def prepare_for_peft(base: Any) -> None:
    """Make PEFT take its 4-bit HiRA layers, and keep the weights as they read them."""
    set_packing(base, False)
    base.is_loaded_in_4bit = True


def factors_in(wrapped: Any, dtype: torch.dtype) -> None:
    """Hold the factors in ``dtype``: PEFT computes in theirs."""
    for name, parameter in wrapped.named_parameters():
        if "hira_" in name:
            parameter.data = parameter.data.to(dtype)


def merged(dense: nn.Module, adapters: Sequence[Factors]) -> list[nn.Module]:
    """For each adapter a dense copy of the 4-bit base with the adapter folded in."""
    base = copy.deepcopy(dense)
    output = output_layer(base)
    copies: list[nn.Module] = []
    with torch.no_grad():
        for module in base.modules():
            if type(module) is nn.Linear and module is not output:
                stored = QuantizedWeight.from_dense(module.weight, "nf4", double_quant=False)
                module.weight.copy_(stored.dequantize(dtype=module.weight.dtype))
        for factors in adapters:
            model = copy.deepcopy(base)
            for path, entry in factors.items():
                weight: Any = model.get_submodule(path).weight
                weight.mul_(1 + entry.b.float() @ entry.a.float())
            copies.append(model.requires_grad_(False).eval())
    return copies


def _config(factors: Factors, targets: Sequence[str]) -> Any:
    import peft

    rank = next(iter(factors.values())).rank
    return peft.HiraConfig(r=rank, target_modules=list(targets))
