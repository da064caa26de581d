"""Whole models on the fused kernel, through Triton's CPU interpreter, against float64.

The interpreter truncates where a GPU rounds, so float16 models are compared, whose last bit is
small; the truth is the same 4-bit model in float32 with every linear layer in float64.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from adapters.errors import SegmentMismatch, SlotNotResident, UnsupportedOption
from adapters.kernels import native_ops
from adapters.kernels.reference import modulated_linear
from adapters.kernels.triton_operands import pack_weight
from adapters.layers.adapted import AdaptedLinear, quantize_embedding
from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation import fused, native_path
from adapters.modulation.fixed_blocks import FixedBlocks
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.residency.packing import pack_adapter
from adapters.segments import Segments, from_rows, from_runs
from tests.stand.interpreted import Kernels, assert_relative, one_layer
from tests.stand.tiny_models import (
    VOCAB,
    FakeWeights,
    build,
    quantize,
    random_factors,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
pytestmark = needs_triton
CPU = torch.device("cpu")
# Float16 through two layers of a model, each linear layer's answer truncated.
MODEL_TOLERANCE = 2e-2
LAYER_TOLERANCE = 3e-3


def both(name: str, targets: tuple[str, ...]) -> tuple[AdaptedModel, AdaptedModel, list[str]]:
    """The model on the fused kernel in float16, its float64 truth, and the targeted layers."""
    found = inject(build(name, quantization="nf4", dtype=torch.float16), strategy="fused")
    same = build(name, quantization="nf4", dtype=torch.float16).float()
    truth = inject(same, strategy="reference")
    paths = [path for path in found.signature.layers if path.rsplit(".", 1)[-1] in targets]
    assert paths
    return found, truth, paths


def install(
    models: tuple[AdaptedModel, AdaptedModel], slot: int, paths: list[str], **options: Any
) -> None:
    found, truth = models
    factors = random_factors(found.signature, paths, dtype=torch.float16, **options)
    found.install(slot, factors)
    truth.install(slot, {path: entry.to(torch.float32) for path, entry in factors.items()})


def calls_of(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> list[int]:
    """Rows of every call of the kernel from now on."""
    calls: list[int] = []
    real = kernels.tiles.hira_linear

    def counted(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(len(x))
        y: torch.Tensor = real(x, *args, **options)
        return y

    monkeypatch.setattr(kernels.tiles, "hira_linear", counted)
    return calls


@torch.no_grad()
def test_mixed_batch_of_an_encoder(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    found, truth, paths = both("distilbert", ("q_lin", "v_lin", "lin2"))
    calls = calls_of(monkeypatch, kernels)
    models = (found, truth)
    install(models, 1, paths, rank=4, seed=1, with_bias=True)
    install(models, 2, paths[:2], rank=17, seed=2)
    install(models, 3, paths, method="lora", rank=5, seed=3)
    install(models, 20, paths, rank=128, seed=4)  # beyond the table's first slots
    ids = torch.randint(0, VOCAB, (7, 9), generator=torch.Generator().manual_seed(1))
    sequences = from_rows([1, 0, 2, 3, 20, 1, 0])
    outputs = []
    for model in models:
        with model.batch(sequences.repeat(9), sequences):
            outputs.append(model.model(ids).logits)
    assert_relative(outputs[0], outputs[1], MODEL_TOLERANCE)
    # Each of the six linear layers of both blocks, and the output's transform; never torch's.
    assert len(calls) >= 12
    assert set(calls) == {63}


@torch.no_grad()
def test_prefill_and_decoding_while_slots_are_replaced(kernels: Kernels) -> None:
    found, truth, paths = both("llama", ("q_proj", "v_proj", "down_proj"))
    models = (found, truth)
    generator = torch.Generator().manual_seed(2)
    sequences = from_rows([1, 2, 0, 1])
    install(models, 1, paths, rank=8, seed=1)
    install(models, 2, paths, method="lora", rank=4, seed=2)
    for turn, rank in enumerate((3, 128, 16)):
        for model in models:
            model.uninstall(1)
        # An adapter that leaves some of the layers of the last one alone.
        install(models, 1, paths[turn:], rank=rank, seed=10 + turn)
        prompt = torch.randint(0, VOCAB, (4, 11), generator=generator)
        step = torch.randint(0, VOCAB, (4, 1), generator=generator)
        outputs = []
        for model in models:
            with model.batch(sequences.repeat(11), sequences):
                first = model.model(prompt, use_cache=True)
            with model.batch(sequences, sequences):
                second = model.model(step, past_key_values=first.past_key_values)
            outputs.append(torch.cat((first.logits, second.logits), dim=1))
        assert_relative(outputs[0], outputs[1], MODEL_TOLERANCE)


@torch.no_grad()
def test_without_a_batch_the_model_is_the_bare_base(kernels: Kernels) -> None:
    found, truth, paths = both("llama", ("q_proj",))
    install((found, truth), 1, paths, rank=8)
    ids = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    assert_relative(found.model(ids).logits, truth.model(ids).logits, MODEL_TOLERANCE)


def answer(
    adapted: AdaptedModel, x: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer says, and the truth from its own weight and factors."""
    layer: Any = adapted.layers["0"]
    with torch.no_grad(), adapted.batch(segments):
        y = adapted.model(x)
    truth = modulated_linear(
        x,
        layer.quantized.dequantize(dtype=torch.float32),
        {s: (f.method, f.a, f.b, f.scale, f.bias) for s, f in layer.slots.items()},
        segments,
        layer.bias,
    )
    return y, truth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 256), (33, 192), (20, 90)])
def test_layer_of_any_shape_and_adapters_of_any_kind(
    kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    adapted, _ = one_layer(shape, dtype)
    for slot, options in enumerate(
        (
            {"rank": 1},
            {"rank": 31, "with_bias": True},
            {"rank": 129},  # more than the kernel takes
            {"rank": 6, "method": "lora", "with_bias": True},
            {"rank": 130, "method": "lora"},
        ),
        start=1,
    ):
        made = random_factors(adapted.signature, ["0"], seed=slot, dtype=dtype, **options)  # type: ignore[arg-type]
        adapted.install(slot, made)
    segments = from_runs([(1, 2), (0, 3), (2, 35), (3, 2), (4, 1), (5, 2), (1, 1)])
    x = torch.randn(segments.rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y, truth = answer(adapted, x, segments)
    assert y.dtype == dtype
    assert_relative(y, truth, LAYER_TOLERANCE if dtype == torch.float16 else 2e-2)


def test_kernel_is_not_given_what_it_cannot_take(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch, kernels)
    adapted, _ = one_layer((16, 63))  # rows of an odd number of inputs
    assert adapted.fused is not None
    assert len(adapted.fused) == 0
    x = torch.randn(3, 63, generator=torch.Generator().manual_seed(1)).half()
    adapted.install(1, random_factors(adapted.signature, ["0"], rank=4, dtype=torch.float16))
    y, truth = answer(adapted, x, from_runs([(1, 2), (0, 1)]))
    assert_relative(y, truth, LAYER_TOLERANCE)
    assert calls == []
    adapted, layer = one_layer()
    with torch.no_grad():
        assert layer(torch.randn(2, 256)).dtype == torch.float32  # rows of another type
        assert layer(torch.empty(0, 256).half()).shape == (0, 48)
    assert calls == []


def test_weight_is_stored_once_in_the_order_of_the_kernel(kernels: Kernels) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(512, 256)).half()
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    quantize(model, "nf4")
    plain = QuantizedWeight.from_linear4bit(model[0])
    before, address = plain.dequantize(), plain.stored.data_ptr()
    adapted = inject(model, strategy="fused")
    layer: Any = adapted.layers["0"]
    weight = layer.quantized
    assert weight.grouped
    assert weight.stored.data_ptr() == address == layer.weight.data_ptr()
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(weight.dequantize(dtype=dtype), before.to(dtype))
    assert weight.nbytes <= 0.57 * 512 * 256
    assert adapted.base_bytes()[0] == weight.nbytes
    assert adapted.fused is not None
    assert adapted.form_bytes == adapted.fused.buffer_bytes > 0


def test_tied_weights_are_reordered_once(kernels: Kernels) -> None:
    torch.manual_seed(4)
    first = QuantizedWeight.from_dense(torch.randn(64, 128), "nf4")
    expected = first.dequantize()
    second = QuantizedWeight(first.kind, first.shape, first.stored, first.scales, block=first.block)
    made = fused.FusedLayers({"a": first, "b": second}, torch.float16, CPU)
    assert len(made) == 2
    assert first.grouped
    assert second.grouped
    assert torch.equal(first.dequantize(), expected)
    assert torch.equal(second.dequantize(), expected)


def test_packed_adapter_is_laid_out_for_the_kernel_and_not_copied(kernels: Kernels) -> None:
    adapted, layer = one_layer()
    made = random_factors(adapted.signature, ["0"], rank=8, dtype=torch.float16)
    weights: Any = FakeWeights({"0": made["0"]})
    packed = pack_adapter(weights, torch.float16, CPU, b_by_column=True)
    factors = packed.to_device(CPU)
    assert torch.equal(factors["0"].b, made["0"].b)
    adapted.install(1, factors)
    kept: SlotFactors = layer.slots[1]
    assert kept.b.data_ptr() == factors["0"].b.data_ptr()
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).half()
    y, truth = answer(adapted, x, from_runs([(1, 40)]))
    assert_relative(y, truth, LAYER_TOLERANCE)


def test_emptied_slot_is_refused_and_segments_must_cover_the_rows(kernels: Kernels) -> None:
    adapted, layer = one_layer()
    adapted.install(1, random_factors(adapted.signature, ["0"], rank=8, dtype=torch.float16))
    assert adapted.fused is not None
    x = torch.zeros(4, 256).half()

    def call(rows: int) -> LayerCall:
        return LayerCall("0", x, layer.quantized, layer.slots, from_runs([(1, rows)]))

    with pytest.raises(SegmentMismatch):
        adapted.fused.linear(call(3))
    adapted.uninstall(1)
    with pytest.raises(SlotNotResident):
        adapted.fused.linear(call(4))


def test_with_fixed_blocks_the_kernel_still_computes_what_it_takes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, layer = one_layer()
    adapted.modulator.fixed = FixedBlocks()
    for slot, rank in ((1, 5), (2, 130)):
        factors = random_factors(adapted.signature, ["0"], rank=rank, dtype=torch.float16)
        adapted.install(slot, factors)
    rows: list[int] = []
    plain = FixedBlocks.product

    def counted(self: FixedBlocks, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return plain(self, x, weight)

    monkeypatch.setattr(FixedBlocks, "product", counted)
    segments = from_runs([(1, 3), (0, 2), (2, 4)])
    x = torch.randn(9, layer.in_features).half()
    with torch.no_grad(), adapted.batch(segments):
        y = adapted.model(x)
    truth = modulated_linear(
        x,
        layer.quantized.dequantize(dtype=torch.float32),
        {s: (f.method, f.a, f.b, f.scale, f.bias) for s, f in layer.slots.items()},
        segments,
        layer.get_parameter("bias"),
    )
    assert_relative(y, truth, 1e-2)
    assert rows == [4]  # a rank above the kernel's


class _Tied(nn.Module):
    """A 4-bit table, and an output layer on the same bytes."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # first: its dtype is the model's
        self.table = nn.Embedding(rows, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight
        self.half()
        quantize_embedding(self.table, "nf4", tied=[self.head])

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2,), (3, 5), ()])
def test_a_table_tied_to_a_fused_head_gives_the_same_rows(
    kernels: Kernels, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = _Tied(32, 256)
    ids = torch.randint(32, shape)
    before = model.table(ids)
    adapted = inject(model, strategy="fused")
    assert isinstance(adapted.layers["head"], AdaptedLinear)
    assert adapted.layers["head"].quantized.grouped
    assert torch.equal(model.table(ids), before)
    # What an adapter modulates is the same rows: y = E[x] + E[x] ⊙ (A[:, x]ᵀ Bᵀ).
    factors = random_factors(adapted.signature, ["table"], dtype=torch.float16, rank=3)
    adapted.install(1, factors)
    own = factors["table"].to(torch.float32)
    flat = ids.reshape(1, -1)
    with adapted.batch(from_rows([1] * flat.numel()), from_rows([1])):
        found = model.table(flat)
    base = before.reshape(1, -1, 256).float()
    assert_relative(found, base * (1 + own.a[:, flat[0]].t() @ own.b.t()), LAYER_TOLERANCE)


def test_the_cpu_kernel_refuses_codes_in_the_order_of_the_fused_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_ops, "available", lambda dtype: True)
    weight = QuantizedWeight.from_dense(torch.randn(16, 256), "nf4")
    call = LayerCall("l", torch.randn(2, 256).bfloat16(), weight, {}, from_runs([(0, 2)]))
    assert native_path.takes(call)
    assert weight.scales is not None
    weight.take_order(pack_weight(weight.stored, weight.scales, "nf4", weight.shape, weight.block))
    assert not native_path.takes(call)


def test_forcing_the_kernel_where_it_cannot_run_is_refused(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedOption, match="fused kernel") as caught:
        inject(build("llama", quantization="nf4", dtype=torch.float32), strategy="fused")
    assert "float32" in str(caught.value.found)
    monkeypatch.setattr(kernels.tiles, "INTERPRETED", False)
    with pytest.raises(UnsupportedOption) as caught:
        inject(build("llama", quantization="nf4", dtype=torch.float16), strategy="fused")
    assert caught.value.found == "device cpu"


def test_by_itself_a_cpu_model_does_not_use_it(kernels: Kernels) -> None:
    adapted = inject(build("llama", quantization="nf4", dtype=torch.float16))
    assert adapted.fused is None
    assert adapted.form_bytes == 0
