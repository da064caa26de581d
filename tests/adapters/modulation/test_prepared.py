"""What layers keep from call to call: never what is no longer true."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from adapters.kernels import native_ops
from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation import modulator as modulation
from adapters.modulation.autotune import Autotuner
from adapters.modulation.folded import FoldedCache
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.strategy import Bucket, Candidate
from adapters.segments import from_rows
from adapters.signature import Method
from tests.stand.tiny_models import random_factors

CPU = torch.device("cpu")
SHAPE = (96, 128)
DTYPES = [torch.float32, torch.bfloat16]
KERNEL_DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not native_ops.available(dtype), reason=f"no compiled kernel for {dtype} here"
        ),
    )
    for dtype in DTYPES
]


def _model(
    dtype: torch.dtype, tuner: Autotuner | None = None, folded_bytes: int = 0
) -> AdaptedModel:
    torch.manual_seed(0)
    adapted = inject(nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])).to(dtype))
    layer = adapted.layers["0"]
    assert isinstance(layer, AdaptedLinear)
    layer.quantized = QuantizedWeight.from_dense(layer.weight.detach(), "nf4")
    adapted.modulator.tuner = tuner
    adapted.modulator.folded = FoldedCache(folded_bytes, CPU)
    return adapted


def _install(adapted: AdaptedModel, slot: int, seed: int, dtype: torch.dtype) -> None:
    factors = random_factors(adapted.signature, ["0"], seed=seed)
    adapted.install(slot, {path: own.to(dtype) for path, own in factors.items()})


def _answers(adapted: AdaptedModel, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    with adapted.batch(from_rows(slots)):
        found: torch.Tensor = adapted.model(x)
        before, adapted.modulator.strategy = adapted.modulator.strategy, "reference"
        truth = adapted.model(x)
        adapted.modulator.strategy = before
    assert float((found.double() - truth.double()).norm() / truth.double().norm()) < 1e-2
    return found


class _Keen(Autotuner):
    """As timed where a kept weight is nearly free to read: it pays at once."""

    def ns(self, bucket: Bucket, candidate: Candidate) -> float | None:
        del bucket
        return 1.0 if candidate[1] in {"kept", "held", "base"} else 1000.0


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulation, "_FEWEST_WEIGHTS", 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_that_changes_hands_is_computed_anew(dtype: torch.dtype) -> None:
    adapted = _model(dtype)
    x = torch.randn(3, SHAPE[1]).to(dtype)
    answers = []
    for seed in (1, 2):
        _install(adapted, 1, seed, dtype)
        answers += [_answers(adapted, x, [1, 0, 1]) for _ in range(3)]
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[3], answers[5])
    assert torch.equal(answers[0][1], answers[3][1])
    assert not torch.allclose(answers[0][0], answers[3][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_folded_weights_once_they_pay(dtype: torch.dtype) -> None:
    one = SHAPE[0] * SHAPE[1] * dtype.itemsize
    adapted = _model(dtype, _Keen(), folded_bytes=2 * one + 5)
    folded = adapted.modulator.folded
    for slot in (1, 2, 3):
        _install(adapted, slot, slot, dtype)
    x = torch.randn(4, SHAPE[1]).to(dtype)
    _answers(adapted, x, [1, 1, 2, 3])
    for _ in range(12):
        _answers(adapted, x, [1, 1, 2, 3])
        assert folded.nbytes == len(folded) * one <= folded.budget_bytes
    assert len(folded) == 2
    kept = [slot for slot in (1, 2, 3) if folded.has(slot, "0")]
    _install(adapted, kept[0], 9, dtype)  # the folded weight is of what was there before
    assert not folded.has(kept[0], "0")
    for _ in range(12):
        _answers(adapted, x, [1, 1, 2, 3])
    assert folded.nbytes == 2 * one


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kept_weights_are_what_the_kernel_reads(dtype: torch.dtype) -> None:
    adapted = _model(dtype, _Keen(), folded_bytes=1 << 20)
    _install(adapted, 1, 1, dtype)
    x = torch.randn(2, SHAPE[1]).to(dtype)
    for _ in range(12):
        _answers(adapted, x, [1, 1])
    kept = adapted.modulator.folded.get(1, "0")
    assert kept is not None
    kept.zero_()  # so that it can be told apart
    with adapted.batch(from_rows([1, 1])):
        found = adapted.model(x)
    bias = adapted.model[0].bias  # type: ignore[index]
    assert torch.equal(found, bias.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_kept_where_it_does_not_pay(dtype: torch.dtype) -> None:
    adapted = _model(dtype, folded_bytes=0)
    _install(adapted, 1, 1, dtype)
    x = torch.randn(2, SHAPE[1]).to(dtype)
    for _ in range(20):
        _answers(adapted, x, [1, 1])
    assert len(adapted.modulator.folded) == 0


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("method", ["hira", "lora"])
def test_nothing_prepared_keeps_factors_that_have_left(method: Method, dtype: torch.dtype) -> None:
    adapted = _model(dtype)
    adapted.modulator.strategy = "native"
    factors = random_factors(adapted.signature, ["0"], method=method, dtype=dtype)
    left = weakref.ref(factors["0"].a)
    adapted.install(1, factors)
    del factors
    _answers(adapted, torch.randn(2, SHAPE[1]).to(dtype), [1, 0])
    assert left() is not None
    adapted.uninstall(1)
    gc.collect()
    assert left() is None
