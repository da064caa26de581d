from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.errors import ShapeMismatch, UnsupportedOption
from adapters.layers.inject import inject
from adapters.signature import LayerSignature, describe
from tests.stand.tiny_models import BUILDERS, VOCAB, WIDTH, build


@pytest.mark.parametrize("name", BUILDERS)
def test_meta_plain_quantized_and_injected_models_have_one_signature(name: str) -> None:
    with torch.device("meta"):
        on_meta = describe(BUILDERS[name](), "base")
    plain = build(name)
    quantized = build(name, quantization="nf4")
    assert describe(plain, "base") == on_meta
    assert describe(quantized, "base") == on_meta
    assert inject(quantized, name="base").signature == on_meta
    assert describe(quantized, "base") == on_meta
    assert on_meta.hidden_size == WIDTH
    assert on_meta.vocab_size == VOCAB
    assert on_meta.max_length == 48


def test_layers_have_their_kinds_and_shapes() -> None:
    layers = describe(build("gpt2"), "base").layers
    assert layers["transformer.h.0.attn.c_attn"] == LayerSignature(
        "transformer.h.0.attn.c_attn", "conv1d_transposed", WIDTH, 3 * WIDTH, has_bias=True
    )
    assert layers["transformer.wte"] == LayerSignature("transformer.wte", "embedding", VOCAB, WIDTH)
    assert layers["lm_head"] == LayerSignature("lm_head", "linear", WIDTH, VOCAB)


def test_output_layers_are_the_heads() -> None:
    assert describe(build("llama"), "").output_layers == {"lm_head"}
    assert describe(build("bert"), "").output_layers == {"cls.predictions.decoder"}
    assert describe(build("bert-backbone"), "").output_layers == frozenset()


def test_paths_resolve_with_and_without_the_prefix() -> None:
    full = describe(build("bert"), "")
    bare = describe(build("bert-backbone"), "")
    path = "encoder.layer.0.attention.self.query"
    assert full.resolve(path) is full.layers[f"bert.{path}"]
    assert full.resolve(f"bert.{path}") is full.layers[f"bert.{path}"]
    assert bare.resolve(path) is bare.layers[path]
    assert full.resolve("bert.encoder.layer.9.attention.self.query") is None


def test_embedding_that_does_not_look_up_ids_is_no_target() -> None:
    # OPT computes its positions from the attention mask, inside the module.
    assert not [path for path in describe(build("opt"), "").layers if "position" in path]


def test_projection_read_as_a_tensor_is_no_target() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert list(describe(model, "").layers) == ["1"]


def test_linear_with_arithmetic_of_its_own_is_no_target() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert not describe(nn.Sequential(Doubling(4, 4)), "").layers


def test_convolution_signature_and_factor_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (5, 2)), nn.Conv1d(4, 8, 3, groups=2))
    layers = describe(model, "").layers
    assert layers["0"].factor_shapes(4, "hira") == ((4, 3, 5, 2), (8, 4, 1, 1))
    with pytest.raises(UnsupportedOption):
        layers["1"].factor_shapes(4, "hira")


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ShapeMismatch):
        LayerSignature("x", "linear", 4, 4).factor_shapes(0, "hira")


def test_positions_that_start_after_the_padding_shorten_the_context() -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=50, pad_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        assert describe(RobertaModel(config), "").max_length == 48
