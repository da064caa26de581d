"""PEFT as a second oracle: one adapter at a time, its own arithmetic, in float32.

On a 4-bit base bitsandbytes' repacking is switched off: with it, PEFT reads garbage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from adapters.layers.inject import inject
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import from_rows
from adapters.signature import Method
from tests.stand.tiny_models import VOCAB, Quantization, build

peft = pytest.importorskip("peft", reason="PEFT is an extra of the project (train)")

LINEAR = {
    "distilbert": ["q_lin", "v_lin", "lin1", "lin2"],
    "bert": ["query", "value", "dense"],
    "opt": ["q_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h"],  # a class of linear layers of its own
}
EMBEDDINGS = {"distilbert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _peft_model(model: nn.Module, method: Method, targets: Iterable[str], rank: int) -> Any:
    options: dict[str, Any] = {"r": rank, "target_modules": list(targets)}
    config: Any
    if method == "hira":
        config = peft.HiraConfig(**options)
    else:
        config = peft.LoraConfig(**options, lora_alpha=12, use_rslora=True)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # where PEFT looks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it comments on Conv1D and on tied weights
        wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in wrapped.named_parameters():
        if "hira_" in name or "lora_" in name:
            scale = 0.3 if "_B" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return wrapped.eval()


def _factors(wrapped: Any, method: Method) -> dict[str, SlotFactors]:
    """What PEFT holds, by the path of the base's layer."""
    factors: dict[str, SlotFactors] = {}
    for name, module in wrapped.named_modules():
        path = name.removeprefix("base_model.model.")
        for kind in (f"{method}_", f"{method}_embedding_"):
            a: Any = getattr(module, f"{kind}A", {})
            b: Any = getattr(module, f"{kind}B", {})
            if "default" not in a:
                continue
            first, second = (getattr(x["default"], "weight", x["default"]) for x in (a, b))
            scale = module.scaling["default"] if method == "lora" else 1.0
            factors[path] = SlotFactors(method, first.clone(), second.clone(), scale)
    return factors


def _compare(
    name: str, method: Method, targets: list[str], rank: int, quantization: Quantization
) -> None:
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))
    wrapped = _peft_model(build(name, quantization=quantization), method, targets, rank)
    expected = wrapped(ids)[0]
    factors = _factors(wrapped, method)
    assert len(factors) >= 1
    adapted = inject(build(name, quantization=quantization))
    base = adapted.model(ids)[0]
    adapted.install(1, factors)
    sequences = from_rows([1, 0, 1])
    with adapted.batch(sequences.repeat(6), sequences):
        found = adapted.model(ids)[0]
    for row, truth in enumerate((expected[0], base[1], expected[2])):
        assert (found[row] - truth).norm() / truth.norm() < 1e-5, row
    assert (expected - base).norm() / base.norm() > 1e-2  # the adapter does something


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("method", ["hira", "lora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_linear_targets_equal_peft(name: str, method: Method, quantization: Quantization) -> None:
    _compare(name, method, LINEAR[name], 6, quantization)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("method", ["hira", "lora"])
def test_embedding_targets_equal_peft(name: str, method: Method) -> None:
    _compare(name, method, [EMBEDDINGS[name]], 4, "none")


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["hira", "lora"])
def test_convolution_targets_equal_peft(method: Method) -> None:
    def make() -> nn.Module:
        torch.manual_seed(4)
        return _Convolutions()

    x = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    wrapped = _peft_model(make(), method, ["first", "second"], 2)
    expected = wrapped(x)
    factors = _factors(wrapped, method)
    adapted = inject(make())
    base = adapted.model(x)
    adapted.install(1, factors)
    with adapted.batch(from_rows([1, 0, 1])):
        found = adapted.model(x)
    for row, truth in enumerate((expected[0], base[1], expected[2])):
        assert (found[row] - truth).norm() / truth.norm() < 1e-5, row
