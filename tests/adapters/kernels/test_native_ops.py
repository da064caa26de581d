from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.kernels import native_ops, reference
from adapters.kernels.native_ops import InstructionSet, Level
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import Strategy
from adapters.segments import Segments, from_runs

Way = Literal["fold", "expand", "kept"]
WAYS: tuple[Way, ...] = ("fold", "expand", "kept")


@dataclass(frozen=True)
class KernelPath:
    """An instruction set of the kernel in one dtype, and how close its answers are."""

    dtype: torch.dtype
    level: Level
    wants: tuple[InstructionSet, ...]  # one of these must be what the kernel runs on
    tolerance: float
    how: Way = "fold"

    @property
    def is_there(self) -> bool:
        with native_ops.limited_to(self.level):
            return native_ops.instruction_set(self.dtype) in self.wants


BFLOAT16 = KernelPath(torch.bfloat16, "best", ("amx", "avx512_bf16"), 1e-2)
FLOAT32 = KernelPath(torch.float32, "best", ("avx512", "avx2"), 2e-6)
PATHS = (
    BFLOAT16,
    replace(BFLOAT16, level="avx512", wants=("avx512_bf16",)),
    replace(FLOAT32, wants=("avx512",)),
    replace(FLOAT32, level="avx2", wants=("avx2",)),
)


def on_paths(paths: Sequence[KernelPath], ways: Sequence[Way] = ()) -> pytest.MarkDecorator:
    """Run a test on each path; skipped where the kernel or this processor lacks it."""
    found = [replace(path, how=way) for path in paths for way in ways] if ways else list(paths)
    return pytest.mark.parametrize(
        "path",
        [
            pytest.param(
                path,
                id=" ".join((str(path.dtype).removeprefix("torch."), path.level, path.how)),
                marks=pytest.mark.skipif(
                    not path.is_there,
                    reason=f"the kernel is not built or this processor has no {path.wants}",
                ),
            )
            for path in found
        ],
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_slot(
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    with_bias: bool = False,
) -> SlotFactors:
    a = torch.randn(rank, shape[1], generator=generator)
    b = torch.randn(shape[0], rank, generator=generator) * 0.5 / rank**0.5
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    return SlotFactors("hira", a.to(dtype), b.to(dtype), bias=bias)


def run(
    x: torch.Tensor,
    weight: QuantizedWeight,
    slots: dict[int, SlotFactors],
    segments: Segments,
    bias: torch.Tensor | None = None,
    *,
    path: KernelPath,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    if y is None:
        y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    found = [slots.get(part.slot) for part in segments.parts]
    kept = [] if path.how != "kept" else [_folded(weight, f) for f in found if f is not None]
    tails = iter(native_ops.as_kept(one) for one in kept)
    records = [
        native_ops.BASE_RECORD
        if f is None
        else f.native_record + next(tails, AS.get(path.how, b""))
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
        level=path.level,
    )
    return y


AS = {"fold": native_ops.AS_FOLD, "expand": native_ops.AS_EXPAND}


def _folded(weight: QuantizedWeight, factors: SlotFactors) -> torch.Tensor:
    exact = reference.modulated_weight(weight.dequantize(), "hira", factors.a, factors.b, 1.0)
    return exact.to(factors.a.dtype)


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
            draw(st.sampled_from([1, 7, 15, 16, 24, 33, 48, 64, 100, 128, 200, 320])),
            draw(st.sampled_from([32, 64, 96, 160, 256, 320, 576])),
        ),
        "kind": draw(st.sampled_from(["nf4", "fp4", "none"])),
        "block": draw(st.sampled_from([64, 128, 256])),
        "nested": draw(st.booleans()),
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


def build(case: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["shape"]
    dense = torch.randn(shape, generator=generator).to(dtype)
    weight = QuantizedWeight.from_dense(
        dense, case["kind"], block=case["block"], double_quant=case["nested"]
    )
    segments = from_runs(case["runs"])
    slots = {
        slot: random_slot(
            shape, case["ranks"][slot - 1], generator, dtype, with_bias=case["own_bias"][slot - 1]
        )
        for slot in range(1, 5)  # slot 5 has nothing for this layer
    }
    x = torch.randn(segments.rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if case["bias"] else None
    return x, weight, slots, segments, bias


@on_paths(PATHS, WAYS)
@settings(max_examples=20, deadline=None)
@given(cases())
def test_kernel_is_exact_to_rounding(path: KernelPath, case: dict[str, Any]) -> None:
    x, weight, slots, segments, bias = build(case, path.dtype)
    found = run(x, weight, slots, segments, bias, path=path)
    expected = truth(x, weight, slots, segments, bias)
    # A lone output can cancel to almost nothing, so an absolute floor stands beside the ratio.
    floor = 2 * path.tolerance * float(x.double().norm(dim=1).max())
    distance = float((found.double() - expected).norm())
    assert distance < path.tolerance * float(expected.norm()) + floor


@on_paths(PATHS, WAYS)
@settings(max_examples=20, deadline=None)
@given(cases())
def test_each_row_is_the_same_alone_and_in_any_batch(
    path: KernelPath, case: dict[str, Any]
) -> None:
    x, weight, slots, segments, bias = build(case, path.dtype)
    together = run(x, weight, slots, segments, bias, path=path)
    for part in segments.parts:
        for row in {part.start, part.stop - 1}:
            only = from_runs([(part.slot, 1)])
            alone = run(x[row : row + 1], weight, slots, only, bias, path=path)
            if part.slot in slots and path.how != "kept" and path.dtype == torch.bfloat16:
                # Sums are over the same tiles in the same order, whatever else is in the batch.
                assert torch.equal(alone[0], together[row])
            else:
                # A few rows are multiplied in another order than many.
                floor = path.tolerance * float(x[row].double().norm())
                distance = float((alone[0].double() - together[row].double()).norm())
                assert distance < path.tolerance * float(together[row].double().norm()) + floor


@on_paths(PATHS, WAYS)
def test_long_segments_are_cut_without_a_seam(path: KernelPath) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (192, 320)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slots = {
        1: random_slot(shape, 9, generator, path.dtype),
        2: random_slot(shape, 128, generator, path.dtype),
    }
    segments = from_runs([(0, 301), (1, 555), (2, 17), (0, 3), (1, 1)])
    x = torch.randn(segments.rows, shape[1], generator=generator).to(path.dtype)
    found = run(x, weight, slots, segments, path=path)
    assert relative_error(found, truth(x, weight, slots, segments)) < path.tolerance


@on_paths(PATHS)
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_small_modulations_survive(path: KernelPath, size: float) -> None:
    # The modulation itself, y − y₀, must be right to the rounding of y.
    generator = torch.Generator().manual_seed(0)
    shape = (64, 2048)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slot = random_slot(shape, 8, generator, path.dtype)
    slot = SlotFactors("hira", slot.a, (slot.b * size).to(path.dtype))
    for rows in (1, 40):
        x = torch.randn(rows, shape[1], generator=generator).to(path.dtype)
        segments = from_runs([(1, rows)])
        found = run(x, weight, {1: slot}, segments, path=path)
        assert relative_error(found, truth(x, weight, {1: slot}, segments)) < min(
            4e-3, path.tolerance
        )


@on_paths(PATHS)
def test_rows_that_are_not_finite_stay_by_themselves(path: KernelPath) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(80, 128, generator=generator), "nf4")
    slots = {slot: random_slot((80, 128), 8, generator, path.dtype) for slot in (1, 2)}
    segments = from_runs([(1, 3), (0, 2), (2, 20)])
    x = torch.randn(segments.rows, 128, generator=generator).to(path.dtype)
    clean = run(x, weight, slots, segments, path=path)
    for row in (1, 4, 9):
        spoilt = x.clone()
        spoilt[row] = float("nan")
        found = run(spoilt, weight, slots, segments, path=path)
        assert bool(found[row].isnan().all())
        kept = [other for other in range(segments.rows) if other != row]
        assert torch.equal(found[kept], clean[kept])


@on_paths(PATHS)
def test_nothing_outside_of_the_output_is_written(path: KernelPath) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (37, 96)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "fp4")
    slots = {1: random_slot(shape, 5, generator, path.dtype)}
    segments = from_runs([(1, 18), (0, 1)])
    x = torch.randn(19, 96, generator=generator).to(path.dtype)
    frame = torch.full((23, 37), 7.0, dtype=path.dtype)
    run(x, weight, slots, segments, y=frame[2:21], path=path)
    assert bool((frame[:2] == 7).all())
    assert bool((frame[21:] == 7).all())
    assert not bool((frame[2:21] == 7).all(dim=1).any())


@on_paths(PATHS)
def test_threads_do_not_change_the_answer(path: KernelPath) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (520, 256)
    weight = QuantizedWeight.from_dense(torch.randn(shape, generator=generator), "nf4")
    slots = {slot: random_slot(shape, 32, generator, path.dtype) for slot in (1, 2)}
    segments = from_runs([(1, 1), (2, 50), (0, 9)])
    x = torch.randn(60, 256, generator=generator).to(path.dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, weight, slots, segments, path=path))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@on_paths(PATHS)
def test_unserved_shape_is_refused_before_any_write(path: KernelPath) -> None:
    weight = QuantizedWeight.from_dense(torch.randn(16, 48).to(path.dtype))
    y = torch.full((2, 16), 7.0, dtype=path.dtype)
    with pytest.raises(ValueError, match="does not serve"):
        run(torch.randn(2, 48).to(path.dtype), weight, {}, from_runs([(0, 2)]), y=y, path=path)
    assert bool((y == 7).all())


@on_paths((BFLOAT16, FLOAT32))
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_it_runs_in_the_threads_that_torch_has(path: KernelPath) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(512, 512, generator=generator), "nf4")
    x = torch.randn(64, 512, generator=generator).to(path.dtype)
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    threads, runtimes = len(os.listdir("/proc/self/task")), _openmp_runtimes()
    for _ in range(5):
        run(x, weight, {}, from_runs([(0, 64)]), path=path)
        torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    assert len(os.listdir("/proc/self/task")) == threads
    # A second OpenMP runtime would bring a second pool of threads.
    assert _openmp_runtimes() == runtimes


def _openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}


def test_factors_that_the_kernel_cannot_read_have_no_record() -> None:
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    assert SlotFactors("hira", a, b).native_record
    assert SlotFactors("hira", a.bfloat16(), b.bfloat16()).native_record
    assert SlotFactors("hira", a.half(), b.half()).native_record == b""
    assert SlotFactors("hira", a.bfloat16(), b).native_record == b""
    assert not SlotFactors("hira", a.t().contiguous().t(), b).native_record


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("level", ["best", "avx2", "none"])
def test_strategy_falls_back_to_torch(
    dtype: torch.dtype, kind: Literal["nf4", "int8", "none"], level: Level
) -> None:
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for shape in ((64, 128), (33, 100)):
        dense = torch.randn(shape, generator=generator).to(dtype)
        weight = QuantizedWeight.from_dense(dense, kind)
        lora = random_slot(shape, 3, generator, dtype)
        slots = {
            1: random_slot(shape, 8, generator, dtype, with_bias=True),
            2: SlotFactors("lora", lora.a, lora.b, 0.7),
            3: random_slot(shape, 4, generator, torch.float16),  # of no dtype of the kernel
        }
        for runs in ([(1, 3), (0, 2), (2, 20), (1, 1)], [(1, 3), (3, 2)]):
            segments = from_runs(runs)
            x = torch.randn(segments.rows, shape[1], generator=generator).to(dtype)
            expected = truth(x, weight, slots, segments)
            strategies: tuple[Strategy, ...] = ("auto", "native")
            for strategy in strategies:
                with native_ops.limited_to(level):
                    call = LayerCall("l", x, weight, slots, segments)
                    found = Modulator(strategy).linear(call)
                assert relative_error(found, expected) < tolerance


def test_a_limit_leaves_out_what_is_better_and_ends() -> None:
    before = native_ops.digest()
    with native_ops.limited_to("avx2"):
        assert native_ops.instruction_set(torch.float32) in {"avx2", None}
        assert not native_ops.available(torch.bfloat16)
    with native_ops.limited_to("none"):
        assert not native_ops.available(torch.float32)
        assert native_ops.instruction_set(torch.bfloat16) is None
    assert native_ops.digest() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=20, deadline=None)
@given(cases())
def test_bare_base_layer_is_exact_to_rounding(dtype: torch.dtype, case: dict[str, Any]) -> None:
    x, weight, _, segments, bias = build(case, dtype)
    expected = truth(x, weight, {}, segments, bias)
    shared = Modulator()
    call = LayerCall("l", x, weight, {}, shared.base_segments(segments.rows), bias)
    found = shared.linear(call)
    assert found.shape == (segments.rows, case["shape"][0])
    assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
