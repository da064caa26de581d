"""Tiny random models of real architectures, and random adapters for them.

Widths are multiples of 64 where weights are quantized, as in real models; odd widths have tests of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from adapters.factors import Factors
from adapters.modulation.slot_factors import SlotFactors
from adapters.signature import BaseSignature, Method

Quantization = Literal["nf4", "fp4", "int8", "none"]

VOCAB = 96
WIDTH = 64


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(
        vocab_size=VOCAB, dim=WIDTH, hidden_dim=128, n_layers=2, n_heads=4,
        max_position_embeddings=48,
    )  # fmt: skip
    return DistilBertForMaskedLM(config)  # type: ignore[no-any-return]


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48,
    )  # fmt: skip
    return BertForMaskedLM(config)  # type: ignore[no-any-return]


def _bert_backbone() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48,
    )  # fmt: skip
    return BertModel(config)  # type: ignore[no-any-return]


def _falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48,
    )  # fmt: skip
    return FalconForCausalLM(config)  # type: ignore[no-any-return]


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48, word_embed_proj_dim=WIDTH,
        pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config)  # type: ignore[no-any-return]


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=48,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)  # type: ignore[no-any-return]


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "distilbert": _distilbert,
    "bert": _bert,
    "bert-backbone": _bert_backbone,
    "opt": _opt,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
}
CAUSAL = ("opt", "gpt2", "llama", "qwen2")


def build(
    name: str,
    *,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """A tiny model in evaluation mode, its linear layers quantized as transformers does it."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4.0)  # so that deltas are well above the noise
    if quantization != "none":
        quantize(model, quantization)
    return model


def quantize(model: nn.Module, quantization: Quantization, double_quant: bool = True) -> None:
    """Replace every linear layer but the output layer by bitsandbytes' quantized one, in place."""
    import bitsandbytes as bnb

    output = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in list(model.named_modules()):
        is_conv1d = type(module).__name__ == "Conv1D"
        if module is output or not (is_conv1d or isinstance(module, nn.Linear)):
            continue
        weight: Any = module.weight
        dense = (weight.t() if is_conv1d else weight).detach().contiguous()
        has_bias = module.bias is not None
        layer: Any
        if quantization == "int8":
            layer = bnb.nn.Linear8bitLt(
                dense.shape[1], dense.shape[0], has_bias, has_fp16_weights=False
            )
            layer.weight = bnb.nn.Int8Params(dense, requires_grad=False).to("cpu")
        else:
            layer = bnb.nn.Linear4bit(
                dense.shape[1],
                dense.shape[0],
                has_bias,
                compress_statistics=double_quant,
                quant_type=quantization,
            )
            layer.weight = bnb.nn.Params4bit(
                dense,
                requires_grad=False,
                quant_type=quantization,
                compress_statistics=double_quant,
                module=layer,
            ).to("cpu")
        layer.bias = module.bias
        layer.source_cls = type(module)
        model.set_submodule(path, layer.eval())


@dataclass(frozen=True)
class FakeConfig:
    method: Method = "hira"


@dataclass(frozen=True)
class FakeWeights:
    """What residency reads of ``adapters.intake.checkpoint.AdapterWeights``."""

    factors: Mapping[str, Factors]
    config: FakeConfig = FakeConfig()
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sparsity: float = 0.0


def random_factors(
    signature: BaseSignature,
    paths: Iterable[str],
    *,
    method: Method = "hira",
    rank: int = 4,
    seed: int = 0,
    size: float = 0.5,
    dtype: torch.dtype = torch.float32,
    with_bias: bool = False,
) -> dict[str, SlotFactors]:
    """Random factors whose modulation has elements of about ``size``."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, SlotFactors] = {}
    for path in paths:
        layer = signature.layers[path]
        shape_a, shape_b = layer.factor_shapes(rank, method)
        a = torch.randn(shape_a, generator=generator)
        b = torch.randn(shape_b, generator=generator) * (size / rank**0.5)
        if method == "lora":
            b /= 8
        bias = torch.randn(layer.out_features, generator=generator) if with_bias else None
        factors[path] = SlotFactors(
            method,
            a.to(dtype),
            b.to(dtype),
            1.0 if method == "hira" else 1.5,
            None if bias is None else bias.to(dtype),
        )
    return factors
