from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from adapters.errors import MissingTensors, NonFinite, ShapeMismatch, SlotNotResident
from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import inject
from adapters.modulation.folded import FoldedCache
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import from_rows
from tests.stand.tiny_models import BUILDERS, CAUSAL, VOCAB, build, random_factors


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_bitsandbytes_module_is_left_and_nothing_repacks(name: str, attention: str) -> None:
    model: Any = build(name, quantization="nf4")
    model.set_attn_implementation(attention)
    packed = {
        path: module.weight.data.clone()
        for path, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    inject(model)
    assert not [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    ids = torch.randint(3, VOCAB, (2, 6))
    first = model(ids)[0]
    assert torch.equal(model(ids)[0], first)
    assert packed
    for path, before in packed.items():
        assert torch.equal(model.get_submodule(path).weight.data, before), path


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_in_a_mixed_batch_equals_each_alone(name: str) -> None:
    model: Any = build(name, quantization="nf4")
    adapted = inject(model)
    paths = list(adapted.signature.layers)
    adapted.install(1, random_factors(adapted.signature, paths, seed=1))
    adapted.install(2, random_factors(adapted.signature, paths, seed=2, method="lora"))
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))

    def generate(rows: slice) -> torch.Tensor:
        sequences = from_rows([1, 0, 2][rows])
        with adapted.batch(sequences.repeat(5), sequences):
            return model.generate(  # type: ignore[no-any-return]
                ids[rows], attention_mask=torch.ones_like(ids[rows]), max_new_tokens=6,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

    together = generate(slice(0, 3))
    alone = torch.cat([generate(slice(row, row + 1)) for row in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_transformers_reads_stays(name: str, quantization: Any) -> None:
    model: Any = build(name, quantization=quantization)

    def read() -> tuple[Any, ...]:
        output = model.get_output_embeddings()
        return (
            model.dtype,
            model.device,
            model.num_parameters(),
            model.get_input_embeddings().weight,
            None if output is None else output.weight,
            sorted(name for name, _ in model.named_parameters()),
        )

    before = read()
    inject(model)
    after = read()
    assert before[:3] == after[:3]
    assert before[3] is after[3]
    assert before[4] is after[4]
    assert before[5] == after[5]


def test_model_is_frozen_and_in_evaluation_mode() -> None:
    model = build("distilbert").train()
    inject(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_second_injection_is_refused() -> None:
    model = build("distilbert")
    inject(model)
    with pytest.raises(ValueError, match="already"):
        inject(model)


def test_weight_that_bitsandbytes_repacked_is_refused() -> None:
    model: Any = build("distilbert", quantization="nf4")
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        inject(model)


def test_base_bytes_count_each_tensor_once() -> None:
    adapted = inject(build("llama", quantization="nf4", dtype=torch.bfloat16))
    linear, other = adapted.base_bytes()
    weights = sum(
        layer.in_features * layer.out_features
        for path, layer in adapted.signature.layers.items()
        if layer.kind == "linear" and path not in adapted.signature.output_layers
    )
    assert weights * 0.56 < linear <= weights * 0.57
    assert other >= VOCAB * 64 * 2  # the table that the head is tied to
    assert other < VOCAB * 64 * 2 * 1.5


def test_slot_without_an_adapter_is_refused_before_anything_runs() -> None:
    adapted = inject(build("distilbert"))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    adapted.model.register_forward_pre_hook(count)
    with pytest.raises(SlotNotResident), adapted.batch(from_rows([0, 7])):
        adapted.model(torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(SlotNotResident), adapted.batch(from_rows([0]), from_rows([3])):
        pass
    with pytest.raises(SlotNotResident), adapted.batch(from_rows([0]), None, from_rows([3])):
        pass
    assert not calls


def test_uninstalled_slot_is_not_resident() -> None:
    adapted = inject(build("distilbert"))
    factors = random_factors(adapted.signature, list(adapted.signature.layers))
    adapted.install(2, factors)
    with adapted.batch(from_rows([2])):
        pass
    adapted.uninstall(2)
    with pytest.raises(SlotNotResident), adapted.batch(from_rows([2])):
        pass
    assert not any(layer.slots for layer in adapted.layers.values())


def test_installing_over_an_adapter_leaves_nothing_of_it() -> None:
    adapted = inject(build("distilbert"))
    paths = list(adapted.signature.layers)
    adapted.install(1, random_factors(adapted.signature, paths))
    adapted.install(1, random_factors(adapted.signature, paths[:1]))
    assert [path for path, layer in adapted.layers.items() if layer.slots] == paths[:1]


def test_cached_weights_of_a_slot_go_with_its_adapter() -> None:
    adapted = inject(nn.Sequential(nn.Linear(8, 8)), strategy="cached")
    adapted.modulator.folded = FoldedCache(1 << 20, torch.device("cpu"))
    x = torch.randn(2, 8)
    outputs = []
    for seed in (1, 2):
        adapted.install(1, random_factors(adapted.signature, ["0"], seed=seed))
        with adapted.batch(from_rows([1, 1])):
            outputs.append(adapted.model(x))
            assert adapted.modulator.folded.has(1, "0")
            adapted.modulator.strategy = "reference"
            torch.testing.assert_close(outputs[-1], adapted.model(x))
            adapted.modulator.strategy = "cached"
    assert not torch.allclose(*outputs)


def test_nested_batches_restore_the_outer_one() -> None:
    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    adapted.install(1, random_factors(adapted.signature, ["0"]))
    x = torch.randn(2, 8)
    with adapted.batch(from_rows([1, 1])):
        outer = adapted.model(x)
        with adapted.batch(from_rows([0, 0])):
            assert not torch.equal(adapted.model(x), outer)
        assert torch.equal(adapted.model(x), outer)


def _broken(factors: SlotFactors, kind: str) -> SlotFactors:
    a, b = factors.a.clone(), factors.b.clone()
    match kind:
        case "rank 0":
            return replace(factors, a=a[:0], b=b[:, :0])
        case "wide":
            return replace(factors, a=torch.cat([a, a], dim=1))
        case "ranks differ":
            return replace(factors, b=torch.cat([b, b], dim=1))
        case "bias":
            return replace(factors, bias=torch.zeros(3))
        case "nan":
            b[1, 1] = float("nan")
        case "infinity":
            a[0, 0] = float("inf")
        case "product overflows":
            a[:] = 1e25
            b[:] = 1e25
        case "nan bias":
            return replace(factors, bias=torch.full((8,), float("nan")))
    return replace(factors, a=a, b=b)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("rank 0", ShapeMismatch),
        ("wide", ShapeMismatch),
        ("ranks differ", ShapeMismatch),
        ("bias", ShapeMismatch),
        ("nan", NonFinite),
        ("infinity", NonFinite),
        ("product overflows", NonFinite),
        ("nan bias", NonFinite),
    ],
)
def test_factors_that_do_not_fit_are_refused_before_any_write(
    kind: str, error: type[Exception]
) -> None:
    adapted = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    good = random_factors(adapted.signature, ["0", "1"])
    adapted.install(1, good)
    with pytest.raises(error):
        adapted.install(1, {**good, "1": _broken(good["1"], kind)})
    assert all(adapted.layers[path].slots == {1: good[path]} for path in ("0", "1"))


def test_loose_bound_on_a_product_does_not_refuse_a_finite_one() -> None:
    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    a, b = torch.zeros(2, 8), torch.zeros(8, 2)
    a[0, 0] = b[0, 1] = 1e25  # they never meet
    adapted.install(1, {"0": SlotFactors("hira", a, b)})


def test_factors_for_an_unknown_layer_are_refused() -> None:
    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    factors = random_factors(adapted.signature, ["0"])
    with pytest.raises(MissingTensors):
        adapted.install(1, {"9": factors["0"]})
    with pytest.raises(SlotNotResident):
        adapted.install(0, factors)


def test_linear_layer_prints_its_storage() -> None:
    model = build("distilbert", quantization="nf4")
    inject(model)
    layer = model.get_submodule("distilbert.transformer.layer.0.attention.q_lin")
    assert isinstance(layer, AdaptedLinear)
    assert "storage=nf4" in repr(layer)


def test_steps_that_are_left_give_back_forms_and_then_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forms:
        """Of the kernels of steps: notes what it was told to choose."""

        chosen: ClassVar[list[tuple[int, tuple[int, ...]]]] = []

        def choose(self, most_rows: int, ranks: Sequence[int]) -> None:
            self.chosen.append((most_rows, tuple(ranks)))

    adapted = inject(nn.Sequential(nn.Linear(8, 8)))
    fused: Any = SimpleNamespace(steps=Forms())
    monkeypatch.setattr(adapted.modulator, "fused", fused)
    rows, texts = adapted.make_static(3, 4, (16,)), adapted.make_static(3)
    adapted.leave_static(rows, forms=True)
    assert Forms.chosen == [(4, (16,)), (1, ())]
    assert adapted.modulator.static is texts
    adapted.leave_static(texts)
    assert adapted.modulator.static is None
