"""A token embedding in 4 bits: what is looked up, what is tied to it, what adapters make of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import nn

from adapters.kernels import reference
from adapters.layers.adapted import (
    AdaptedEmbedding,
    AdaptedLinear,
    QuantizedEmbedding,
    quantize_embedding,
)
from adapters.layers.inject import inject
from adapters.modulation.quant import QuantizedWeight
from adapters.segments import from_rows
from adapters.signature import Method
from server.base.load import BaseModelError, load_base, signature_of
from server.engine.engine import Engine
from tests.stand import tiny_bases
from tests.stand.tiny_models import random_factors

ROWS, WIDTH = 96, 128


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def truth(weight: torch.Tensor, kind: str, *, double_quant: bool) -> torch.Tensor:
    """The table as bitsandbytes itself gives it back, float64."""
    packed, state = functional.quantize_4bit(
        weight.float(), blocksize=64, quant_type=kind, compress_statistics=double_quant
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state).double()
    return found


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_looked_up_rows_are_those_of_the_dequantized_table(kind: Any, double_quant: bool) -> None:
    torch.manual_seed(0)
    table = torch.randn(ROWS, WIDTH)
    stored = QuantizedWeight.from_dense(table, kind, double_quant=double_quant)
    ids = torch.randint(ROWS, (3, 7))
    expected = truth(table, kind, double_quant=double_quant)[ids]
    torch.testing.assert_close(
        stored.rows(ids, torch.float32).double(), expected, atol=1e-6, rtol=1e-6
    )
    assert stored.rows(ids, torch.bfloat16).dtype == torch.bfloat16


def test_rows_that_share_blocks_are_refused() -> None:
    stored = QuantizedWeight.from_dense(torch.randn(8, 96), "nf4")
    with pytest.raises(ValueError, match="blocks"):
        stored.rows(torch.tensor([1]), torch.float32)
    with pytest.raises(ValueError, match="width 96"):
        quantize_embedding(nn.Embedding(8, 96), "nf4")


@pytest.mark.parametrize("method", ["hira", "lora"])
def test_adapters_modulate_the_rows_of_the_quantized_table(method: Method) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(ROWS, WIDTH)
    weight = truth(base.weight.data, "nf4", double_quant=True)
    quantize_embedding(base, "nf4")
    adapted = inject(nn.Sequential(base))
    layer = adapted.model[0]  # type: ignore[index]
    assert isinstance(layer, AdaptedEmbedding)
    assert isinstance(layer, QuantizedEmbedding)
    factors = random_factors(adapted.signature, ["0"], method=method, rank=3)["0"]
    adapted.install(1, {"0": factors})
    ids = torch.randint(ROWS, (2, 5))
    with adapted.batch(from_rows([1] * 5 + [0] * 5), from_rows([1, 0])):
        found = adapted.model(ids).double()
    expected = weight[ids]
    expected[0] = reference.modulated_embedding(
        ids[0], weight, method=method, a=factors.a, b=factors.b, scale=factors.scale
    )
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert (expected[0] - weight[ids[0]]).norm() > 1.0


@pytest.mark.parametrize("kind", ["distilbert", "bert", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_base_with_a_quantized_embedding_is_that_of_the_dequantized_table(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    base = tiny_bases.base_folder(tmp_path, kind)
    options = tiny_bases.options(
        base, tmp_path, quantization="nf4", quantize_embeddings=True, dtype=dtype
    )
    loaded = load_base(options)
    assert signature_of(options) == loaded.adapted.signature
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    plain = load_base(tiny_bases.options(base, tmp_path, quantization="nf4", dtype=dtype))
    weight = plain.model.get_input_embeddings().weight
    head = plain.model.get_output_embeddings()
    tied = head.weight is weight
    wanted = truth(weight.data, "nf4", double_quant=True)
    plain.model.get_input_embeddings().weight = nn.Parameter(wanted.to(weight.dtype))
    if tied:
        head.weight = plain.model.get_input_embeddings().weight
        head.quantized.stored = head.weight
    ids = torch.randint(5, tiny_bases.VOCABULARY, (2, 6))
    found, expected = loaded.model(ids).logits.double(), plain.model(ids).logits.double()
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == "fp32" else 3e-2)
    output = loaded.model.get_output_embeddings()
    assert isinstance(output, AdaptedLinear)
    assert (output.quantized is embedding.quantized) == tied
    saved = sum(plain.adapted.base_bytes()) - sum(loaded.adapted.base_bytes())
    count = tiny_bases.VOCABULARY * 64
    assert saved == pytest.approx(count * (loaded.dtype.itemsize - 0.5625), rel=0.01)


def test_an_engine_answers_from_it(tmp_path: Path) -> None:
    base = tiny_bases.base_folder(tmp_path, "distilbert")
    folder = tiny_bases.adapter(
        tmp_path / "a", base, "text-classification", targets=["word_embeddings", "q_lin"]
    )
    store = tmp_path / "store"
    version = tiny_bases.stored(store, folder)
    options = tiny_bases.options(base, store, quantization="nf4", quantize_embeddings=True)
    engine = Engine.build(options)
    sample = tiny_bases.texts(1, seed=4)[0]
    found = engine.encode(
        [sample], task="text-classification", version=version, function_to_apply="none"
    ).outputs[0]
    whole = tiny_bases.Reference(base, None, "", quantization="nf4", quantize_embeddings=True)
    adapted = tiny_bases.Reference(
        base, folder, "text-classification", quantization="nf4", quantize_embeddings=True
    )
    item = engine.text.tokenize([sample], "text-classification")[0]
    wanted = adapted(item.token_ids).logits[0]
    scores = {one["label"]: one["score"] for one in found}
    assert [scores["no"], scores["yes"]] == pytest.approx(wanted.tolist(), abs=2e-4)
    vector = engine.encode([sample], task="feature-extraction", normalize=False).outputs[0]
    hidden = whole(item.token_ids).last_hidden_state[0].mean(0)
    assert vector == pytest.approx(hidden.tolist(), abs=2e-4)
    engine.close()


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("bert", {"quantization": "int8"}, "int8"),
        ("bert", {"quantization": "none"}, "none"),
        ("vit", {"quantization": "nf4"}, "ViTPatchEmbeddings"),
    ],
)
def test_what_cannot_be_stored_so_is_refused_at_the_start(
    tmp_path: Path, kind: str, changes: dict[str, Any], found: str
) -> None:
    base = tiny_bases.base_folder(tmp_path, kind)
    with pytest.raises(BaseModelError) as caught:
        load_base(tiny_bases.options(base, tmp_path, quantize_embeddings=True, **changes))
    assert found in str(caught.value.found)


def test_a_subclass_of_an_embedding_is_left_alone() -> None:
    class Scaled(nn.Embedding):
        pass

    embedding = Scaled(8, 64)
    before = copy.deepcopy(embedding.weight.data)
    with pytest.raises(ValueError, match="Scaled"):
        quantize_embedding(embedding, "nf4")
    assert torch.equal(embedding.weight.data, before)
