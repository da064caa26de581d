"""The fused kernel against float64, through Triton's CPU interpreter.

The interpreter multiplies in float32 and truncates to bfloat16, so answers are taken in float32:
what is left to differ is the order of the sums.
"""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters.errors import SegmentMismatch, ShapeMismatch, SlotNotResident
from adapters.kernels.nibbles import FourBitKind, level_values
from adapters.kernels.reference import ReferenceFactors, modulated_linear
from adapters.kernels.triton_operands import FactorTable, pack_weight
from adapters.kernels.triton_tiles import BatchTiles, split_inputs
from adapters.segments import Segments, from_runs
from tests.stand.interpreted import Kernels

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CPU = torch.device("cpu")
SUM_ORDER_TOLERANCE = 1e-5
Adapter = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """A random 4-bit layer, and its float64 W0 from the definition of the format."""

    def __init__(
        self,
        shape: tuple[int, int],
        kind: FourBitKind = "nf4",
        *,
        block: int = 64,
        group: bool = True,
    ) -> None:
        dense = torch.randn(shape) * 0.3
        self.packed, self.state = functional.quantize_4bit(
            dense, blocksize=block, compress_statistics=False, quant_type=kind
        )
        scales = self.state.absmax
        self.weight = pack_weight(self.packed, scales, kind, shape, block, group=group)
        byte = self.packed.reshape(-1)
        codes = torch.stack((byte >> 4, byte & 15), dim=1).reshape(-1)
        levels = torch.tensor(level_values(kind))[codes.long()]
        flat = levels.double() * scales.double().repeat_interleave(block)[: levels.numel()]
        self.w0 = flat.view(shape)


def random_adapter(
    shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.bfloat16
) -> Adapter:
    """A ``[r, in]``, and B ``[out, r]`` as the table wants it; B A is of the order of 1."""
    out_features, in_features = shape
    a = torch.randn(rank, in_features).to(dtype)
    b_t = (torch.randn(rank, out_features) / rank**0.5).to(dtype)
    return a, b_t.t()


def answer(
    ops: Kernels,
    layer: Layer,
    adapters: dict[int, Adapter],
    segments: Segments,
    *,
    dtype: torch.dtype = torch.bfloat16,
    with_bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the kernel's y in float32, and the truth in float64."""
    out_features, in_features = layer.weight.shape
    x = torch.randn(segments.rows, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if with_bias else None
    table = FactorTable(max(adapters, default=0) + 1, [layer.weight.shape], dtype, CPU)
    for slot, factors in adapters.items():
        table.place(slot, {0: factors})
    out = torch.full((segments.rows, out_features), torch.nan)
    y = ops.tiles.hira_linear(
        x, layer.weight, table, 0, BatchTiles(segments, CPU), bias=bias, out=out
    )
    assert y is out
    slots: dict[int, ReferenceFactors] = {
        slot: ("hira", a, b, 1.0, None) for slot, (a, b) in adapters.items()
    }
    return x, y, modulated_linear(x, layer.w0, slots, segments, bias)


def assert_close(
    found: torch.Tensor, truth: torch.Tensor, tolerance: float = SUM_ORDER_TOLERANCE
) -> None:
    # To the largest answer, but no smaller than 0.1: one output alone may cancel to nothing.
    error = (found.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)
    assert error <= tolerance, f"relative error {error:.2e}"


@needs_triton
@pytest.mark.parametrize("rank", [1, 4, 8, 31, 32, 64, 128])
def test_every_rank_agrees_with_float64(ops: Kernels, rank: int) -> None:
    torch.manual_seed(rank)
    layer = Layer((72, 256))
    adapters = {1: random_adapter((72, 256), rank), 2: random_adapter((72, 256), rank)}
    # Slot 1 has a tile of its own, slot 2 shares one with the base.
    segments = from_runs([(1, 40), (2, 3), (0, 2)])
    _, y, truth = answer(ops, layer, adapters, segments)
    assert_close(y, truth)


SHAPES = [
    (64, 128),  # whole tiles
    (130, 384),  # a tail of outputs
    (33, 192),  # in a multiple of the block, not of a tile
    (20, 90),  # blocks of scales straddle rows
    (7, 66),
    (1, 2),
]


@needs_triton
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an interpreted failure takes minutes to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    runs=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1, 1, 1, 2, 5, 17, 33, 70])),
        min_size=1,
        max_size=7,
    ),
    ranks=st.lists(st.sampled_from([1, 3, 16, 17, 40]), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_batch_agrees_with_float64(  # noqa: PLR0917
    ops: Kernels,
    shape: tuple[int, int],
    kind: FourBitKind,
    dtype: torch.dtype,
    runs: list[tuple[int, int]],
    ranks: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = Layer(shape, kind)
    adapters = {slot + 1: random_adapter(shape, rank, dtype) for slot, rank in enumerate(ranks)}
    _, y, truth = answer(
        ops, layer, adapters, from_runs(runs), dtype=dtype, with_bias=bool(seed % 2)
    )
    assert_close(y, truth)


@needs_triton
@pytest.mark.parametrize("in_features", [1152, 1090])
def test_sum_split_over_programs_agrees_with_float64(ops: Kernels, in_features: int) -> None:
    torch.manual_seed(5)
    shape = (24, in_features)
    assert split_inputs(in_features, 1, 4)[0] > 2
    adapters = {slot: random_adapter(shape, 5 * slot) for slot in range(1, 8)}
    segments = from_runs([(slot, 1) for slot in (3, 1, 0, 7, 2, 5, 1, 4, 6, 0)])
    _, y, truth = answer(ops, Layer(shape), adapters, segments)
    assert_close(y, truth)


@needs_triton
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_both_byte_orders_and_larger_blocks_agree(ops: Kernels, group: bool, block: int) -> None:
    torch.manual_seed(11)
    layer = Layer((40, 384), "fp4", block=block, group=group)
    assert layer.weight.grouped == group
    assert torch.equal(layer.weight.ungrouped(), layer.packed.reshape(-1))
    adapters = {1: random_adapter((40, 384), 9), 2: random_adapter((40, 384), 33)}
    _, y, truth = answer(ops, layer, adapters, from_runs([(2, 34), (1, 4)]))
    assert_close(y, truth)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_truth_is_what_bitsandbytes_dequantizes(kind: FourBitKind) -> None:
    torch.manual_seed(2)
    layer = Layer((32, 128), kind)
    theirs = functional.dequantize_4bit(layer.packed, layer.state).double()
    assert_close(theirs, layer.w0, 1e-6)


@needs_triton
def test_answer_of_a_row_is_the_same_alone_and_in_any_batch(ops: Kernels) -> None:
    torch.manual_seed(3)
    shape = (48, 256)
    layer = Layer(shape)
    table = FactorTable(4, [shape], torch.bfloat16, CPU)
    for slot, rank in ((1, 8), (2, 40), (3, 16)):
        table.place(slot, {0: random_adapter(shape, rank)})
    slots = [random.Random(3).randrange(4) for _ in range(150)]
    x = torch.randn(len(slots), 256).to(torch.bfloat16)

    def run(rows: list[int]) -> torch.Tensor:
        batch = BatchTiles(from_runs([(slots[row], 1) for row in rows]), CPU)
        out = torch.empty(len(rows), 48)
        y: torch.Tensor = ops.tiles.hira_linear(x[rows], layer.weight, table, 0, batch, out=out)
        return y

    mixed = run(list(range(len(slots))))
    for row in range(0, len(slots), 19):
        assert_close(run([row])[0], mixed[row].double())
    assert_close(run([149, 3, 3, 77]), mixed[[149, 3, 3, 77]].double())


@needs_triton
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy, of inf - inf
@pytest.mark.parametrize("rows", [2, 40])
def test_infinities_of_one_slot_stay_in_its_rows(ops: Kernels, rows: int) -> None:
    torch.manual_seed(4)
    shape = (32, 128)
    a, b = random_adapter(shape, 4)
    a[1, 5] = torch.inf
    adapters = {1: random_adapter(shape, 4), 2: (a, b)}
    segments = from_runs([(1, rows), (2, rows), (0, rows), (1, 1)])
    _, y, truth = answer(ops, Layer(shape), adapters, segments)
    own = torch.tensor(segments.row_slots()) == 2
    assert not y[own].isfinite().any()
    assert_close(y[~own], truth[~own])


@needs_triton
def test_output_has_the_type_of_the_rows_and_rows_may_be_strided(ops: Kernels) -> None:
    torch.manual_seed(6)
    shape = (32, 128)
    layer, factors = Layer(shape), random_adapter(shape, 16, torch.float16)
    table = FactorTable(2, [(8, 8), shape], torch.float16, CPU)
    table.place(1, {1: factors})
    segments = from_runs([(1, 3), (0, 40)])
    wide = torch.randn(43, 300).to(torch.float16)
    x = wide[:, 100:228]
    y = ops.tiles.hira_linear(x, layer.weight, table, 1, BatchTiles(segments, CPU))
    assert y.dtype == torch.float16
    truth = modulated_linear(x, layer.w0, {1: ("hira", *factors, 1.0, None)}, segments, None)
    assert_close(y, truth, 1e-3)


@needs_triton
def test_replaced_slot_answers_with_its_new_factors(ops: Kernels) -> None:
    torch.manual_seed(8)
    shape = (32, 128)
    layer = Layer(shape)
    table = FactorTable(2, [shape, shape], torch.bfloat16, CPU)
    segments = from_runs([(1, 2)])
    batch = BatchTiles(segments, CPU)
    x = torch.randn(2, 128).to(torch.bfloat16)
    for rank, at in ((8, 0), (32, 0), (8, 1)):
        factors = random_adapter(shape, rank)
        table.place(1, {at: factors})
        y = ops.tiles.hira_linear(x, layer.weight, table, 0, batch, out=torch.empty(2, 32))
        # The last adapter leaves layer 0 alone.
        slots: dict[int, ReferenceFactors] = {} if at else {1: ("hira", *factors, 1.0, None)}
        assert_close(y, modulated_linear(x, layer.w0, slots, segments, None))


@needs_triton
def test_wrong_calls_are_refused_before_anything_is_written(ops: Kernels) -> None:
    shape = (32, 128)
    layer = Layer(shape)
    table = FactorTable(3, [shape, (32, 64)], torch.bfloat16, CPU)
    table.place(1, {0: random_adapter(shape, 8)})
    table.place(2, {0: random_adapter(shape, 8)})
    table.clear(2)
    assert table.addresses[1].any() and not table.addresses[2].any()  # noqa: PT018
    x = torch.randn(4, 128).to(torch.bfloat16)
    out = torch.full((4, 32), 7.0)
    good: dict[str, Any] = {
        "x": x,
        "layer": 0,
        "runs": [(1, 4)],
        "bias": None,
        "out": out,
        "tiles": CPU,
    }
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (SegmentMismatch, {"runs": [(1, 3)]}),
        (SegmentMismatch, {"runs": [(1, 5)]}),
        (SlotNotResident, {"runs": [(1, 3), (2, 1)]}),
        (SlotNotResident, {"runs": [(1, 3), (3, 1)]}),
        (ShapeMismatch, {"x": x.float()}),
        (ShapeMismatch, {"x": x.half()}),
        (ShapeMismatch, {"x": x[:, :64]}),
        (ShapeMismatch, {"x": x[None]}),
        (ShapeMismatch, {"x": x.repeat_interleave(2, dim=1)[:, ::2]}),
        (ShapeMismatch, {"layer": 1}),
        (ShapeMismatch, {"layer": 2}),
        (ShapeMismatch, {"bias": torch.zeros(31)}),
        (ShapeMismatch, {"out": out[:3]}),
        (ShapeMismatch, {"x": x.to("meta")}),
        (ShapeMismatch, {"tiles": torch.device("meta")}),
    ]
    for expected, change in wrong:
        call = good | change
        with pytest.raises(expected):
            ops.tiles.hira_linear(
                call["x"],
                layer.weight,
                table,
                call["layer"],
                BatchTiles(from_runs(call["runs"]), call["tiles"]),
                bias=call["bias"],
                out=call["out"],
            )
        assert torch.equal(out, torch.full((4, 32), 7.0)), change


def test_wrong_factors_leave_the_slot_as_it_was() -> None:
    shape = (32, 128)
    table = FactorTable(2, [shape], torch.bfloat16, CPU)
    a, b = random_adapter(shape, 8)
    table.place(1, {0: (a, b)})
    before = table.addresses.clone()
    big_a, big_b = random_adapter(shape, 129)
    shifted = torch.zeros(8 * 128 + 1, dtype=torch.bfloat16)[1:].view(8, 128)
    for wrong in (
        (big_a, big_b),
        (a[:0], b[:, :0]),
        (a[:7], b),
        (a, b.contiguous()),
        (a.float(), b),
        (a, b.half()),
        (a[:, :64], b),
        (shifted, b),
    ):
        with pytest.raises(ShapeMismatch):
            table.place(1, {0: wrong})
        assert torch.equal(table.addresses, before)
        assert table.rank(1, 0) == 8
    for slot in (0, 2, -1):
        with pytest.raises(SlotNotResident):
            table.place(slot, {0: (a, b)})
    with pytest.raises(ShapeMismatch):
        FactorTable(2, [shape], torch.float32, CPU)


def test_wrong_weights_are_refused() -> None:
    layer = Layer((32, 128))
    packed, scales = layer.packed, layer.state.absmax
    pack_weight(packed, scales, "nf4", (32, 128), 64)
    with pytest.raises(ShapeMismatch, match="start at a byte"):
        pack_weight(packed, scales, "nf4", (128, 31), 64)
    with pytest.raises(ShapeMismatch, match="packed weight"):
        pack_weight(packed, scales, "nf4", (32, 256), 64)
    with pytest.raises(ShapeMismatch, match="scales"):
        pack_weight(packed, scales, "nf4", (32, 128), 128)
    with pytest.raises(ShapeMismatch, match="scales"):
        pack_weight(packed, scales.half(), "nf4", (32, 128), 64)


def test_bytes_a_weight() -> None:
    weight = Layer((512, 1024)).weight
    parts: list[torch.Tensor] = [weight.packed, weight.levels, weight.scales]
    assert weight.nbytes == sum(part.nbytes for part in parts) <= 0.564 * 512 * 1024
