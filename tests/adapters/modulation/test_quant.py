from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.modulation import quant
from adapters.modulation.quant import QuantizedWeight, unpack_4bit
from tests.stand.tiny_models import quantize

FourBit = Literal["nf4", "fp4"]
FOUR_BIT: tuple[FourBit, ...] = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NF4's widest gap is 0.304 of a block's largest magnitude, FP4's 1/3: half of it is the error.
HALF_GAP = {"nf4": 0.16, "fp4": 0.17}


def _quantized_linear(
    out_features: int, in_features: int, kind: FourBit, double_quant: bool = True
) -> Any:
    model = nn.Sequential(nn.Linear(in_features, out_features))
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    quantize(model, kind, double_quant)
    return model[0]


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantization_equals_bitsandbytes(
    kind: FourBit, dtype: torch.dtype, double_quant: bool
) -> None:
    layer = _quantized_linear(96, 128, kind, double_quant)
    state = layer.weight.quant_state
    state.dtype = dtype
    expected = functional.dequantize_4bit(layer.weight.data.clone(), state)
    weight = QuantizedWeight.from_linear4bit(layer)
    assert torch.equal(weight.dequantize(dtype=dtype), expected)
    buffer = torch.full((96, 128), 7.0, dtype=dtype)
    assert weight.dequantize(buffer) is buffer
    assert torch.equal(buffer, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 200),
    st.sampled_from(FOUR_BIT),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape_dequantizes_to_within_half_a_level(
    rows: int, columns: int, kind: FourBit, double_quant: bool, seed: int
) -> None:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = QuantizedWeight.from_dense(dense, kind, double_quant=double_quant)
    error = (weight.dequantize() - dense).reshape(-1).abs()
    blocks = torch.split(error, 64), torch.split(dense.reshape(-1), 64)
    for block, magnitudes in zip(*blocks, strict=True):
        slack = 0.08 if double_quant else 1e-6  # the scales themselves are rounded, too
        assert block.max() <= magnitudes.abs().max() * HALF_GAP[kind] + slack


def test_rows_that_are_no_multiple_of_a_block_avoid_the_wrong_kernel() -> None:
    # 64 x 96: bitsandbytes' own CPU kernel is off by more than the weights themselves.
    dense = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    ours = QuantizedWeight.from_dense(dense, "nf4", double_quant=False).dequantize()
    assert (ours - dense).norm() / dense.norm() < 0.12


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_native_kernel_and_plain_path_agree(kind: FourBit) -> None:
    dense = torch.randn(32, 192, generator=torch.Generator().manual_seed(1))
    weight = QuantizedWeight.from_dense(dense, kind)
    assert weight.scales is not None
    plain = unpack_4bit(weight.stored, weight.scales, kind, shape=weight.shape, block=64)
    torch.testing.assert_close(weight.dequantize(), plain, rtol=1e-6, atol=0)


def test_without_a_native_kernel_the_plain_path_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    weight = QuantizedWeight.from_dense(dense, "nf4")
    before = weight.dequantize(dtype=torch.bfloat16)
    monkeypatch.setattr(quant, "_native_dequantizer", lambda kind, dtype: None)
    assert torch.equal(weight.dequantize(dtype=torch.bfloat16), before)


def test_four_bit_weights_cost_at_most_0_57_bytes_each_and_no_second_copy() -> None:
    layer = _quantized_linear(256, 512, "nf4")
    weight = QuantizedWeight.from_linear4bit(layer)
    assert weight.nbytes / (256 * 512) <= 0.57
    assert weight.stored.data_ptr() == layer.weight.data.data_ptr()
    state = layer.weight.quant_state
    assert state.absmax is weight.scales
    assert state.state2 is None


def test_packed_weight_in_wider_storage_is_read_as_bytes() -> None:
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=torch.bfloat16)
    layer.weight = Params4bit(
        dense, requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16, module=layer
    ).to("cpu")
    expected = QuantizedWeight.from_dense(dense, "nf4").dequantize()
    assert torch.equal(QuantizedWeight.from_linear4bit(layer).dequantize(), expected)


def test_repacked_weight_is_refused() -> None:
    layer = _quantized_linear(64, 64, "nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        QuantizedWeight.from_linear4bit(layer)


def test_weight_not_quantized_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantized weight"):
        QuantizedWeight.from_linear4bit(Linear4bit(64, 64))
    with pytest.raises(ValueError, match="no quantized weight"):
        QuantizedWeight.from_linear8bit(Linear8bitLt(64, 64, has_fp16_weights=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_scaled_by_their_largest_magnitude(dtype: torch.dtype) -> None:
    dense = torch.randn(33, 50, generator=torch.Generator().manual_seed(3))
    weight = QuantizedWeight.from_dense(dense, "int8")
    assert weight.scales is not None
    expected = weight.stored.double() * weight.scales.double().unsqueeze(1) / 127
    found = weight.dequantize(dtype=dtype).double()
    assert (found - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps
    assert (expected - dense).abs().max() < dense.abs().max() / 200


def test_int8_layer_of_bitsandbytes_is_taken_over() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    before: Any = model[0].weight
    dense = before.detach().clone()
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    quantize(model, "int8")
    weight = QuantizedWeight.from_linear8bit(model[0])
    assert weight.kind == "int8"
    assert (weight.dequantize() - dense).abs().max() < dense.abs().max() / 100


def test_dense_weight_is_neither_copied_nor_written() -> None:
    dense = torch.randn(8, 12)
    weight = QuantizedWeight.from_dense(dense)
    assert weight.dequantize().data_ptr() == dense.data_ptr()
    transposed = QuantizedWeight.from_dense(dense, transposed=True)
    assert transposed.shape == (12, 8)
    assert torch.equal(transposed.dequantize(), dense.t())
    buffer = torch.empty(8, 12, dtype=torch.bfloat16)
    assert torch.equal(weight.dequantize(buffer), dense.bfloat16())
