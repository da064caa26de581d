from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.kernels import native_ops, reference
from adapters.kernels.native_ops import Level
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import Strategy
from adapters.segments import Segments, from_runs

TOLERANCE = 1e-2
Way = Literal["fold", "expand", "kept"]
WAYS: tuple[Way, ...] = ("fold", "expand", "kept")

needs_kernel = pytest.mark.skipif(
    not native_ops.available(),
    reason="the compiled kernel is not built, or this processor has no AVX512-BF16",
)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_slot(
    shape: tuple[int, int], rank: int, generator: torch.Generator, *, with_bias: bool = False
) -> SlotFactors:
    a = torch.randn(rank, shape[1], generator=generator)
    b = torch.randn(shape[0], rank, generator=generator) * 0.5 / rank**0.5
    bias = torch.randn(shape[0], generator=generator).bfloat16() if with_bias else None
    return SlotFactors("hira", a.bfloat16(), b.bfloat16(), bias=bias)


def run(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: dict[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None = None,
    *,
    how: Way = "fold",
    level: Level = "best",
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    if y is None:
        y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=torch.bfloat16)
    found = [slots.get(part.slot) for part in segments.parts]
    kept = [] if how != "kept" else [_folded(weight, f) for f in found if f is not None]
    tails = iter(native_ops.as_kept(one) for one in kept)
    records = [
        native_ops.BASE_RECORD if f is None else f.native_record + next(tails, AS.get(how, b""))
        for f in found
    ]
    native_ops.modulated_linear_into(
        y,
        x,
        stored=weight.stored,
        scales=weight.scales,
        kind=weight.kind,
        block=weight.block,
        bias=bias,
        bounds=native_ops.pack_bounds(segments),
        records=b"".join(records),
        scratch=lambda count: torch.empty(count, dtype=torch.uint8),
        level=level,
    )
    return y


AS = {"fold": native_ops.AS_FOLD, "expand": native_ops.AS_EXPAND}


def _folded(weight: QuantizedWeight, factors: SlotFactors) -> torch.Tensor:
    exact = reference.modulated_weight(weight.dequantize(), "hira", factors.a, factors.b, 1.0)
    return exact.bfloat16()


def truth(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: dict[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    entries = {slot: (f.method, f.a, f.b, f.scale, f.bias) for slot, f in slots.items()}
    return reference.modulated_linear(x, weight.dequantize(), entries, segments, bias)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shape": (
            draw(st.sampled_from([1, 15, 16, 33, 64, 100, 128, 200, 320])),
            draw(st.sampled_from([32, 64, 96, 160, 256, 320, 576])),
        ),
        "kind": draw(st.sampled_from(["nf4", "fp4", "none"])),
        "block": draw(st.sampled_from([64, 128])),
        "ranks": draw(
            st.lists(st.sampled_from([1, 3, 4, 8, 31, 32, 64, 100, 128]), min_size=4, max_size=4)
        ),
        "runs": draw(
            st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=8)
        ),
        "own_bias": draw(st.lists(st.booleans(), min_size=4, max_size=4)),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def build(case: dict[str, Any]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["shape"]
    dense = torch.randn(shape, generator=generator).bfloat16()
    weight = QuantizedWeight.from_dense(dense, case["kind"], block=case["block"])
    segments = from_runs(case["runs"])
    slots = {
        slot: random_slot(
            shape, case["ranks"][slot - 1], generator, with_bias=case["own_bias"][slot - 1]
        )
        for slot in range(1, 5)  # slot 5 has nothing for this layer
    }
    x = torch.randn(segments.rows, shape[1], generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16() if case["bias"] else None
    return x, weight, slots, segments, bias


@needs_kernel
@pytest.mark.parametrize("level", ["best", "avx512"])
@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=30, deadline=None)
@given(cases())
def test_kernel_is_exact_to_rounding(level: Level, how: Way, case: dict[str, Any]) -> None:
    x, weight, slots, segments, bias = build(case)
    found = run(x, weight, slots, segments, bias, how=how, level=level)
    expected = truth(x, weight, slots, segments, bias)
    # A lone output can cancel to almost nothing, so an absolute floor stands beside the ratio.
    floor = 0.02 * float(x.double().norm(dim=1).max())
    assert float((found.double() - expected).norm()) < TOLERANCE * float(expected.norm()) + floor


@needs_kernel
@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=20, deadline=None)
@given(cases())
def test_each_row_is_the_same_alone_and_in_any_batch(how: Way, case: dict[str, Any]) -> None:
    x, weight, slots, segments, bias = build(case)
    together = run(x, weight, slots, segments, bias, how=how)
    for part in segments.parts:
        for row in {part.start, part.stop - 1}:
            alone = run(x[row : row + 1], weight, slots, from_runs([(part.slot, 1)]), bias, how=how)
            if part.slot in slots and how != "kept":
                # Sums are over the same tiles in the same order, whatever else is in the batch.
                assert torch.equal(alone[0], together[row])
            else:
                # A few rows are multiplied line by line, so in another order than many.
                floor = 0.01 * float(x[row].double().norm())
                distance = float((alone[0].double() - together[row].double()).norm())
                assert distance < TOLERANCE * float(together[row].double().norm()) + floor


@needs_kernel
@pytest.mark.parametrize("how", WAYS)
def test_long_segments_are_cut_without_a_seam(how: Way) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (192, 320)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slots = {1: random_slot(shape, 9, generator), 2: random_slot(shape, 128, generator)}
    segments = from_runs([(0, 301), (1, 555), (2, 17), (0, 3), (1, 1)])
    x = torch.randn(segments.rows, shape[1], generator=generator).bfloat16()
    found = run(x, weight, slots, segments, how=how)
    assert relative_error(found, truth(x, weight, slots, segments)) < TOLERANCE


@needs_kernel
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_small_modulations_survive(size: float) -> None:
    # The modulation itself, y − y₀, must be right to the rounding of y.
    generator = torch.Generator().manual_seed(0)
    shape = (64, 2048)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slot = random_slot(shape, 8, generator)
    slot = SlotFactors("hira", slot.a, (slot.b * size).bfloat16())
    for rows in (1, 40):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        segments = from_runs([(1, rows)])
        found = run(x, weight, {1: slot}, segments)
        assert relative_error(found, truth(x, weight, {1: slot}, segments)) < 4e-3


@needs_kernel
def test_rows_that_are_not_finite_stay_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(80, 128, generator=generator), "nf4")
    slots = {slot: random_slot((80, 128), 8, generator) for slot in (1, 2)}
    segments = from_runs([(1, 3), (0, 2), (2, 20)])
    x = torch.randn(segments.rows, 128, generator=generator).bfloat16()
    clean = run(x, weight, slots, segments)
    for row in (1, 4, 9):
        spoilt = x.clone()
        spoilt[row] = float("nan")
        found = run(spoilt, weight, slots, segments)
        assert bool(found[row].isnan().all())
        kept = [other for other in range(segments.rows) if other != row]
        assert torch.equal(found[kept], clean[kept])


@needs_kernel
def test_nothing_outside_of_the_output_is_written() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (37, 96)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "fp4")
    slots = {1: random_slot(shape, 5, generator)}
    segments = from_runs([(1, 18), (0, 1)])
    x = torch.randn(19, 96, generator=generator).bfloat16()
    frame = torch.full((23, 37), 7.0, dtype=torch.bfloat16)
    run(x, weight, slots, segments, y=frame[2:21])
    assert bool((frame[:2] == 7).all())
    assert bool((frame[21:] == 7).all())
    assert not bool((frame[2:21] == 7).all(dim=1).any())


@needs_kernel
def test_threads_do_not_change_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (520, 256)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slots = {slot: random_slot(shape, 32, generator) for slot in (1, 2)}
    segments = from_runs([(1, 1), (2, 50), (0, 9)])
    x = torch.randn(60, 256, generator=generator).bfloat16()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, weight, slots, segments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernel
def test_unserved_shape_is_refused_before_any_write() -> None:
    weight = QuantizedWeight.from_dense(torch.randn(16, 48).bfloat16())
    y = torch.full((2, 16), 7.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not serve"):
        run(torch.randn(2, 48).bfloat16(), weight, {}, from_runs([(0, 2)]), y=y)
    assert bool((y == 7).all())


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_it_runs_in_the_threads_that_torch_has() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(512, 512, generator=generator), "nf4")
    x = torch.randn(64, 512, generator=generator).bfloat16()
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    threads, runtimes = len(os.listdir("/proc/self/task")), _openmp_runtimes()
    for _ in range(5):
        run(x, weight, {}, from_runs([(0, 64)]))
        torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    assert len(os.listdir("/proc/self/task")) == threads
    # A second OpenMP runtime would bring a second pool of threads.
    assert _openmp_runtimes() == runtimes


def _openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}


def test_factors_that_the_kernel_cannot_read_have_no_record() -> None:
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    assert SlotFactors("hira", a, b).native_record == b""
    assert SlotFactors("hira", a.bfloat16(), b.bfloat16()).native_record
    assert not SlotFactors("hira", a.bfloat16().t().contiguous().t(), b.bfloat16()).native_record


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("is_there", [True, False])
def test_strategy_falls_back_to_torch(
    kind: Literal["nf4", "int8", "none"], is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_there:
        monkeypatch.setattr(native_ops, "_level", lambda: 0)
        assert not native_ops.available()
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (33, 100)):
        dense = torch.randn(shape, generator=generator).bfloat16()
        weight = QuantizedWeight.from_dense(dense, kind)
        lora = random_slot(shape, 3, generator)
        slots = {
            1: random_slot(shape, 8, generator, with_bias=True),
            2: SlotFactors("lora", lora.a, lora.b, 0.7),
        }
        segments = from_runs([(1, 3), (0, 2), (2, 20), (1, 1)])
        x = torch.randn(segments.rows, shape[1], generator=generator).bfloat16()
        expected = truth(x, weight, slots, segments)
        strategies: tuple[Strategy, ...] = ("auto", "native")
        for strategy in strategies:
            found = Modulator(strategy).linear(LayerCall("l", x, weight, slots, segments))
            assert relative_error(found, expected) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(cases())
def test_bare_base_layer_is_exact_to_rounding(case: dict[str, Any]) -> None:
    x, weight, _, segments, bias = build(case)
    expected = truth(x, weight, {}, segments, bias)
    shared = Modulator()
    call = LayerCall("l", x, weight, {}, shared.base_segments(segments.rows), bias)
    found = shared.linear(call)
    assert found.shape == (segments.rows, case["shape"][0])
    assert relative_error(found, expected) < TOLERANCE
