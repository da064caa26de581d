from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapters.errors import SegmentMismatch
from adapters.kernels import reference
from adapters.layers.adapted import AdaptedEmbedding, AdaptedLinear
from adapters.layers.inject import AdaptedModel, inject
from adapters.segments import from_rows
from adapters.signature import Method
from tests.stand.merged import merged_outputs
from tests.stand.tiny_models import BUILDERS, VOCAB, Quantization, build, random_factors

METHODS: tuple[Method, ...] = ("hira", "lora")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["distilbert", "bert", "bert-backbone", "opt", "gpt2", "llama"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_mixed_batch_equals_one_merged_float64_model_per_adapter(
    name: str, quantization: Quantization
) -> None:
    adapted = inject(build(name, quantization=quantization))
    paths = list(adapted.signature.layers)
    hira = random_factors(adapted.signature, paths, rank=3, seed=1)
    lora = random_factors(adapted.signature, paths, method="lora", rank=5, seed=2)
    some = random_factors(adapted.signature, paths[1::3], rank=2, seed=3)
    for slot, factors in enumerate((hira, lora, some), start=1):
        adapted.install(slot, factors)
    sequences = from_rows([1, 0, 2, 3, 1])
    ids = _ids(5, 6)
    with adapted.batch(sequences.repeat(6), sequences):
        found = adapted.model(ids)[0]
    expected = merged_outputs(name, [hira, {}, lora, some, hira], ids, quantization=quantization)
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_mixed_batch_in_bfloat16_is_within_its_rounding(name: str) -> None:
    dtype = torch.bfloat16
    adapted = inject(build(name, quantization="nf4", dtype=dtype))
    paths = [path for path in adapted.signature.layers if "lin" in path or "proj" in path]
    hira = random_factors(adapted.signature, paths, seed=1, size=0.1, dtype=dtype)
    lora = random_factors(adapted.signature, paths, method="lora", seed=2, dtype=dtype)
    adapted.install(1, hira)
    adapted.install(2, lora)
    sequences = from_rows([1, 0, 2])
    ids = _ids(3, 6)
    with adapted.batch(sequences.repeat(6), sequences):
        found = adapted.model(ids)[0]
    expected = merged_outputs(name, [hira, {}, lora], ids, quantization="nf4", dtype=dtype)
    assert (found.double() - expected).norm() / expected.norm() < 3e-2  # of the whole model


@pytest.mark.parametrize("name", BUILDERS)
def test_without_a_batch_the_model_is_the_bare_base(name: str) -> None:
    model = build(name)
    ids = _ids(2, 6)
    before = model(ids)[0]
    adapted = inject(model)
    adapted.install(1, random_factors(adapted.signature, list(adapted.signature.layers)))
    assert torch.equal(model(ids)[0], before)
    sequences = from_rows([0, 0])
    with adapted.batch(sequences.repeat(6), sequences):
        assert torch.equal(model(ids)[0], before)


def test_adapter_on_one_of_two_tied_layers_leaves_the_other() -> None:
    for path in ("lm_head", "model.embed_tokens"):
        adapted = inject(build("llama"))
        assert adapted.model.lm_head.weight is adapted.model.model.embed_tokens.weight  # type: ignore[union-attr]
        factors = random_factors(adapted.signature, [path])
        adapted.install(1, factors)
        ids = _ids(1, 6)
        with adapted.batch(from_rows([1] * 6), from_rows([1])):
            found = adapted.model(ids)[0]
        expected = merged_outputs("llama", [factors], ids)
        assert (found.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_own_bias_replaces_the_layers(method: Method) -> None:
    adapted = inject(build("distilbert", quantization="nf4"))
    paths = [path for path in adapted.signature.layers if path.endswith(("q_lin", "v_lin"))]
    factors = random_factors(adapted.signature, paths, method=method, with_bias=True)
    adapted.install(1, factors)
    sequences = from_rows([0, 1])
    ids = _ids(2, 6)
    with adapted.batch(sequences.repeat(6), sequences):
        found = adapted.model(ids)[0]
    expected = merged_outputs("distilbert", [{}, factors], ids, quantization="nf4")
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_equals_its_merged_kernel(method: Method, dims: int) -> None:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    conv = cls(3, 6, 3, stride=2, padding=1)
    weight, bias = conv.weight.double(), conv.bias.double()  # type: ignore[union-attr]
    adapted = inject(nn.Sequential(conv))
    factors = random_factors(adapted.signature, ["0"], method=method, rank=2)
    adapted.install(1, factors)
    entry = factors["0"]
    x = torch.randn(4, 3, *([7] * dims))
    with adapted.batch(from_rows([1, 0, 1, 1])):
        found = adapted.model(x)
    plain = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    merged = reference.modulated_weight(weight, method, entry.a, entry.b, entry.scale)
    expected = plain(x.double(), merged, bias, stride=2, padding=1)
    expected[1] = plain(x[1:2].double(), weight, bias, stride=2, padding=1)[0]
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


def test_pointwise_convolution_with_own_bias() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 1)
    weight = conv.weight.double()
    adapted = inject(nn.Sequential(conv))
    factors = random_factors(adapted.signature, ["0"], rank=2, with_bias=True)
    adapted.install(1, factors)
    entry = factors["0"]
    assert entry.bias is not None
    x = torch.randn(2, 4, 3, 3)
    with adapted.batch(from_rows([1, 1])):
        found = adapted.model(x)
    merged = reference.modulated_weight(weight, "hira", entry.a, entry.b, 1.0)
    expected = F.conv2d(x.double(), merged, entry.bias.double())
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what the model multiplies by stays outside of HiRA's term, as in PEFT."""

    embed_scale: torch.Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("embed_scale", torch.tensor(4.0), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


@pytest.mark.parametrize("method", METHODS)
def test_embedding_of_a_subclass_keeps_what_the_subclass_does(method: Method) -> None:
    torch.manual_seed(0)
    base = ScaledEmbedding(20, 8)
    weight = base.weight.double()
    adapted = inject(nn.Sequential(base))
    assert isinstance(adapted.model[0], ScaledEmbedding)  # type: ignore[index]
    assert isinstance(adapted.model[0], AdaptedEmbedding)  # type: ignore[index]
    factors = random_factors(adapted.signature, ["0"], method=method, rank=2)["0"]
    adapted.install(1, {"0": factors})
    ids = torch.randint(20, (2, 5))
    with adapted.batch(from_rows([1] * 5 + [0] * 5), from_rows([1, 0])):
        found = adapted.model(ids)
    modulated = reference.modulated_embedding(
        ids, weight, method=method, a=factors.a, b=factors.b, scale=factors.scale
    )
    plain = weight[ids]
    inner = 1.0 if method == "hira" else 4.0
    expected = plain * 4 + (modulated - plain) * inner
    expected[1] = plain[1] * 4
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


def _one_layer(rows: int) -> tuple[AdaptedModel, torch.Tensor]:
    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    adapted.install(1, random_factors(adapted.signature, ["0"]))
    return adapted, torch.randn(rows, 8)


def test_rows_that_no_segment_table_covers_are_refused() -> None:
    adapted, x = _one_layer(5)
    with adapted.batch(from_rows([1, 1, 0])), pytest.raises(SegmentMismatch):
        adapted.model(x)


def test_layer_without_factors_for_the_batch_takes_any_rows() -> None:
    adapted, x = _one_layer(5)
    with adapted.batch(from_rows([0, 0])):
        assert torch.equal(adapted.model(x), adapted.model[0](x))  # type: ignore[index]


def test_parameters_move_and_convert_with_the_layer() -> None:
    torch.manual_seed(0)
    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    layer = adapted.model[0]  # type: ignore[index]
    assert isinstance(layer, AdaptedLinear)
    adapted.model.double()
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer._parameters["bias"]))
    assert layer.quantized.stored is layer.weight
