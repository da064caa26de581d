from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import SegmentMismatch
from adapters.kernels import reference, torch_ops
from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator
from adapters.modulation.plan import Plan
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import STRATEGIES, Strategy
from adapters.modulation.workspace import Workspace
from adapters.segments import Segments, from_rows, from_runs
from adapters.signature import Method

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CPU = torch.device("cpu")


def modulator(strategy: Strategy, folded_bytes: int = 1 << 24) -> Modulator:
    made = Modulator(strategy)
    made.folded = FoldedCache(folded_bytes, CPU)
    return made


def linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: dict[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None = None,
    *,
    modulator: Modulator,
) -> torch.Tensor:
    return modulator.linear(LayerCall("l", x, weight, slots, segments, bias))


def random_slot(
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator,
    *,
    method: Method = "hira",
    dtype: torch.dtype = torch.float32,
    with_bias: bool = False,
    size: float = 0.5,
) -> SlotFactors:
    a = torch.randn(rank, shape[1], generator=generator)
    b = torch.randn(shape[0], rank, generator=generator) * size / rank**0.5
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    scale = 1.0 if method == "hira" else 0.7
    return SlotFactors(method, a.to(dtype), b.to(dtype), scale, bias)


def truth(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: dict[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    entries = {slot: (f.method, f.a, f.b, f.scale, f.bias) for slot, f in slots.items()}
    return reference.modulated_linear(x, weight.dequantize(), entries, segments, bias)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shape": draw(st.sampled_from([(64, 128), (128, 64), (96, 96), (33, 100), (1, 64)])),
        "kind": draw(st.sampled_from(["nf4", "fp4", "int8", "none"])),
        "runs": draw(
            st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=8)
        ),
        "ranks": draw(st.lists(st.integers(1, 40), min_size=5, max_size=5)),
        "methods": draw(
            st.lists(st.sampled_from(["hira", "hira", "lora"]), min_size=5, max_size=5)
        ),
        "own_bias": draw(st.lists(st.booleans(), min_size=5, max_size=5)),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def _build(case: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(case["seed"])
    shape: tuple[int, int] = case["shape"]
    dense = torch.randn(shape, generator=generator).to(dtype)
    weight = QuantizedWeight.from_dense(dense, case["kind"])
    segments = from_runs(case["runs"])
    slots = {
        slot: random_slot(
            shape, case["ranks"][slot - 1], generator, dtype=dtype,
            method=case["methods"][slot - 1], with_bias=case["own_bias"][slot - 1],
        )
        for slot in range(1, 5)  # slot 5 is resident, but has nothing for this layer
    }  # fmt: skip
    x = torch.randn(segments.rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if case["bias"] else None
    return x, weight, slots, segments, bias


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(cases())
def test_every_strategy_is_exact_to_rounding(
    strategy: Strategy, dtype: torch.dtype, case: dict[str, Any]
) -> None:
    x, weight, slots, segments, bias = _build(case, dtype)
    shared = modulator(strategy)
    expected = truth(x, weight, slots, segments, bias)
    for _ in range(2):  # the second call finds used buffers and a filled cache
        found = linear(x, weight, slots, segments, bias, modulator=shared)
        assert found.dtype == dtype
        # A lone output can cancel to almost nothing, so an absolute floor stands beside the ratio.
        floor = 2 * float(x.double().norm(dim=1).max())
        distance = float((found.double() - expected).norm())
        assert distance < TOLERANCE[dtype] * (float(expected.norm()) + floor)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=15, deadline=None)
@given(cases())
def test_rows_have_the_same_answer_alone_and_in_any_batch(
    strategy: Strategy, case: dict[str, Any]
) -> None:
    x, weight, slots, segments, bias = _build(case, torch.float32)
    shared = modulator(strategy)
    together = linear(x, weight, slots, segments, bias, modulator=shared)
    for part in segments.parts:
        rows = slice(part.start, part.stop)
        alone = linear(
            x[rows], weight, slots, from_runs([(part.slot, part.rows)]), bias,
            modulator=shared,
        )  # fmt: skip
        assert relative_error(alone, together[rows].double()) < TOLERANCE[torch.float32]


@settings(max_examples=10, deadline=None)
@given(cases())
def test_inputs_are_not_written(case: dict[str, Any]) -> None:
    x, weight, slots, segments, bias = _build(case, torch.float32)
    tensors = [x, weight.stored, *(t for f in slots.values() for t in (f.a, f.b))]
    before = [tensor.clone() for tensor in tensors]
    for strategy in STRATEGIES:
        linear(x, weight, slots, segments, bias, modulator=modulator(strategy))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_small_modulations_survive_bfloat16(rows: int, size: float) -> None:
    # 1 + BA in bfloat16 would lose half of a modulation of 2e-3. Here only W0 ⊙ BA and the sum are
    # rounded, each to half a unit of its own size.
    generator = torch.Generator().manual_seed(0)
    shape = (128, 4096)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator).bfloat16())
    slot = random_slot(shape, 8, generator, dtype=torch.bfloat16, size=size)
    folded = torch.empty(shape, dtype=torch.bfloat16)
    torch_ops.fold_into(folded, weight.dequantize(dtype=torch.bfloat16), slot.a, slot.b)
    exact = reference.modulated_weight(weight.stored, "hira", slot.a, slot.b, 1.0)
    rounded = exact.abs() + (exact - weight.stored.double()).abs()
    assert bool(((folded.double() - exact).abs() <= 2**-8 * rounded).all())
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    for strategy in STRATEGIES:
        found = linear(x, weight, {1: slot}, from_runs([(1, rows)]), modulator=modulator(strategy))
        expected = truth(x, weight, {1: slot}, from_runs([(1, rows)]), None)
        assert relative_error(found, expected) < TOLERANCE[torch.bfloat16]


def test_long_expansions_are_cut_to_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(16, 64, generator=generator))
    slots = {slot: random_slot((16, 64), 128, generator) for slot in (1, 2)}
    segments = from_runs([(1, 90), (2, 3)])
    x = torch.randn(93, 64, generator=generator)
    shared = modulator("expand")
    found = linear(x, weight, slots, segments, modulator=shared)
    assert relative_error(found, truth(x, weight, slots, segments, None)) < 1e-5
    assert shared.workspace.nbytes <= 4096 * (16 + 64) * 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_segments_that_do_not_cover_the_rows_are_refused(strategy: Strategy) -> None:
    weight = QuantizedWeight.from_dense(torch.randn(8, 8))
    with pytest.raises(SegmentMismatch):
        linear(torch.randn(3, 8), weight, {}, from_rows([0, 0]), modulator=modulator(strategy))


def test_factors_of_another_dtype_are_converted() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(64, 64, generator=generator), "nf4")
    slot = random_slot((64, 64), 4, generator, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=generator)
    segments = from_runs([(1, 5)])
    for strategy in STRATEGIES:
        found = linear(x, weight, {1: slot}, segments, modulator=modulator(strategy))
        assert relative_error(found, truth(x, weight, {1: slot}, segments, None)) < 1e-5


def test_output_overlaps_no_buffer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(64, 64, generator=generator), "nf4")
    slots = {1: random_slot((64, 64), 4, generator)}
    x = torch.randn(5, 64, generator=generator)
    shared = modulator("auto")
    first = linear(x, weight, slots, from_runs([(1, 5)]), modulator=shared)
    kept = first.clone()
    linear(x * 2, weight, slots, from_runs([(1, 5)]), modulator=shared)
    assert torch.equal(first, kept)


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(64, 64, generator=generator), "nf4")
    slots = {1: random_slot((64, 64), 4, generator)}
    x = torch.randn(5, 64, generator=generator)
    for strategy in STRATEGIES:
        shared = modulator(strategy)
        with torch.inference_mode():
            inside = linear(x, weight, slots, from_runs([(1, 5)]), modulator=shared)
        outside = linear(x, weight, slots, from_runs([(1, 5)]), modulator=shared)
        assert torch.equal(inside, outside)


def test_cached_strategy_never_exceeds_its_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (64, 64)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slots = {slot: random_slot(shape, 4, generator) for slot in range(1, 8)}
    one = 64 * 64 * 4
    shared = modulator("cached", folded_bytes=3 * one + 7)
    cache = shared.folded
    assert isinstance(cache, FoldedCache)
    for step in range(20):
        segments = from_runs([(1 + (step * 3 + k) % 7, 2) for k in range(5)])
        x = torch.randn(10, 64, generator=generator)
        found = linear(x, weight, slots, segments, modulator=shared)
        assert relative_error(found, truth(x, weight, slots, segments, None)) < 1e-5
        assert cache.nbytes <= 3 * one
    assert len(cache) == 3
    cache.forget(7)
    assert not cache.has(7, "l")


def test_cached_weight_is_used_and_forgotten_with_its_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(64, 64, generator=generator), "nf4")
    slots = {1: random_slot((64, 64), 4, generator)}
    shared = modulator("cached")
    x = torch.randn(2, 64, generator=generator)
    before = linear(x, weight, slots, from_rows([1, 1]), modulator=shared)
    slots[1] = replace(slots[1], b=slots[1].b * 2)
    stale = linear(x, weight, slots, from_rows([1, 1]), modulator=shared)
    assert torch.equal(before, stale)
    shared.folded.forget(1)
    fresh = linear(x, weight, slots, from_rows([1, 1]), modulator=shared)
    assert relative_error(fresh, truth(x, weight, slots, from_rows([1, 1]), None)) < 1e-5
    assert not torch.equal(before, fresh)


def test_workspace_grows_to_its_largest_use_only() -> None:
    workspace = Workspace()
    small = workspace.take("a", (2, 3), torch.float32, CPU)
    large = workspace.take("a", (4, 5), torch.float32, CPU)
    again = workspace.take("a", (2, 3), torch.float32, CPU)
    assert small.shape == again.shape == (2, 3)
    assert again.data_ptr() == large.data_ptr()
    assert workspace.nbytes == 80


Lead = tuple[int, ...]


@pytest.mark.parametrize(
    ("lead", "is_output", "expected"),
    [
        ((3, 4), False, [1] * 4 + [0] * 4 + [2] * 4),  # [B, T, H]
        ((1, 12), False, [1] * 4 + [0] * 4 + [2] * 4),  # [1, N, H]
        ((12,), False, [1] * 4 + [0] * 4 + [2] * 4),  # flattened tokens, as OPT has them
        ((3,), False, [1, 0, 2]),  # a pooler
        ((3, 1), False, [1, 0, 2]),  # a decoding step
        ((3, 2), False, [1, 1, 0, 0, 2, 2]),
        ((1, 2), True, [1, 2]),  # logits of some rows
        ((2,), True, [1, 2]),
    ],
)
def test_layers_find_their_rows_by_shape(
    lead: Lead, is_output: Literal[False, True], expected: list[int]
) -> None:
    sequences = from_rows([1, 0, 2])
    plan = Plan(sequences.repeat(4), sequences, from_rows([1, 2]))
    assert plan.of_rows(lead, "layer", is_output).row_slots() == expected


@pytest.mark.parametrize("lead", [(5,), (2, 5), (1, 2), (4, 3, 2)])
def test_rows_of_no_table_are_refused(lead: Lead) -> None:
    sequences = from_rows([1, 0, 2])
    with pytest.raises(SegmentMismatch):
        Plan(sequences.repeat(4), sequences, from_rows([1, 2])).of_rows(lead, "layer")


def test_a_fold_that_failed_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = QuantizedWeight.from_dense(torch.randn(64, 64, generator=generator), "nf4")
    slots = {1: random_slot((64, 64), 4, generator)}
    x = torch.randn(40, 64, generator=generator)
    segments = from_runs([(1, 40)])
    made = modulator("cached")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for the fold")

    with monkeypatch.context() as patch:
        patch.setattr(torch_ops, "fold_into", fail)
        with pytest.raises(torch.OutOfMemoryError):
            linear(x, weight, slots, segments, modulator=made)
    assert not made.folded.has(1, "l")
    y = linear(x, weight, slots, segments, modulator=made)
    torch.testing.assert_close(
        y.double(), truth(x, weight, slots, segments, None), rtol=1e-4, atol=1e-4
    )
