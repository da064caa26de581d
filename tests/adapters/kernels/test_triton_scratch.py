"""Layers by scratch memory, of one row, and LoRA by address: against float64, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels.nibbles import lookup_assembly
from adapters.kernels.reference import modulated_weight
from adapters.kernels.triton_operands import (
    FACTOR_COLUMNS,
    HALF_FEATURES,
)
from adapters.kernels.triton_tiles import (
    FewRows,
    ManyRows,
    TokenTiles,
    one_row_blocks,
    padded_rank,
    share_tiles,
    slot_tiles,
)
from tests.stand.compiled import Limits, assert_within, compile_kernel
from tests.stand.interpreted import (
    Kernels,
    RandomLayer,
    assert_exact,
    filled_with_nan,
)

pytest.importorskip("triton", reason="triton is not installed")

# Where each kernel is.
OWNERS = {
    "scratch": ("scratch_weight_kernel", "expand_rows_kernel", "contract_rows_kernel"),
    "row": ("one_row_kernel",),
    "tiles": ("lora_down_kernel", "lora_up_kernel"),
}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "rank"), [((72, 256), 5), ((40, 96), 16), ((64, 128), 128)])
def test_a_written_weight_is_the_modulated_one(
    ops: Kernels, shape: tuple[int, int], rank: int, kind: Any
) -> None:
    torch.manual_seed(rank)
    layer = RandomLayer(shape, {1: rank}, kind)
    out = torch.full(shape, float("nan"))
    ops.scratch.write_weight(out, layer.weight, layer.addresses, 1, 0, 0)
    assert_exact(out, layer.w0.double())
    ops.scratch.write_weight(out, layer.weight, layer.addresses, 1, 1, padded_rank(rank))
    a, b = layer.factors[1]
    assert_exact(out, modulated_weight(layer.w0, "hira", a, b, 1.0))


@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_by_one_product(ops: Kernels, with_bias: bool) -> None:
    torch.manual_seed(1)
    layer = RandomLayer((72, 256), {1: 3, 2: 16, 4: 7})
    runs = [(1, 1), (0, 1), (2, 1), (4, 2), (3, 1), (1, 2)]  # slot 3 has nothing in this layer
    slots = [slot for slot, count in runs for _ in range(count)]
    x = torch.randn(len(slots), 256)
    bias = torch.randn(72) if with_bias else None
    rows = torch.tensor(slots, dtype=torch.int32)
    found = ops.scratch.product_linear(
        x, layer.weight, layer.addresses, 1, rows, rank=16, take=filled_with_nan, bias=bias
    )
    assert_exact(found, layer.truth(x, runs, bias))
    # A row does not depend on how many there are.
    alone = ops.scratch.product_linear(
        x[4:5],
        layer.weight,
        layer.addresses,
        1,
        rows[4:5],
        rank=16,
        take=filled_with_nan,
        bias=bias,
    )
    assert torch.equal(alone[0], found[4])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "rank"), [((72, 256), 5), ((40, 96), 16), ((72, 1408), 30), ((64, 128), 128)]
)
def test_one_row_by_its_own_kernel(
    ops: Kernels, shape: tuple[int, int], rank: int, kind: Any
) -> None:
    torch.manual_seed(rank)
    layer = RandomLayer(shape, {1: 9, 2: rank}, kind)
    zero = torch.zeros(1, dtype=torch.int32)
    for slot, bias in ((0, None), (1, torch.randn(shape[0])), (2, torch.randn(shape[0]))):
        x = torch.randn(1, shape[1])
        found = ops.row.one_row_linear(
            x, layer.weight, layer.addresses, 1, zero + slot,
            rank=padded_rank(rank), first_row=zero, bias=bias,
        )  # fmt: skip
        assert_exact(found, layer.truth(x, [(slot, 1)], bias))


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_by_weights_in_scratch(ops: Kernels, with_bias: bool) -> None:
    torch.manual_seed(2)
    layer = RandomLayer((72, 256), {1: 3, 2: 30})
    runs = [(1, 20), (0, 17), (2, 33), (1, 5), (0, 2)]
    pieces, start = [], 0
    for slot, count in runs:
        rank = padded_rank(layer.factors[slot][0].shape[0]) if slot else 0
        pieces.append((slot, rank, start, start + count))
        start += count
    x = torch.randn(start, 256)
    bias = torch.randn(72) if with_bias else None
    found = ops.scratch.scratch_linear(
        x, layer.weight, layer.addresses, 1, pieces, take=filled_with_nan, bias=bias
    )
    assert_exact(found, layer.truth(x, runs, bias))


def test_an_adapter_that_overflows_stays_in_its_rows(ops: Kernels) -> None:
    torch.manual_seed(3)
    layer = RandomLayer((72, 256), {1: 16, 2: 4})
    layer.factors[1][0].fill_(float("inf"))
    x = torch.randn(4, 256)
    rows = torch.tensor([1, 2, 0, 1], dtype=torch.int32)
    found = ops.scratch.product_linear(
        x, layer.weight, layer.addresses, 1, rows, rank=16, take=filled_with_nan, bias=None
    )
    truth = layer.truth(x[1:3], [(2, 1), (0, 1)], None)
    assert_exact(found[1:3], truth)
    assert not torch.isfinite(found[0]).any()


def test_rows_of_fixed_tiles_are_the_equation(ops: Kernels) -> None:
    torch.manual_seed(4)
    layer = RandomLayer((72, 256), {1: 3, 2: 16, 5: 9})
    rows, most = 20, 24
    order, entries, bounds = torch.arange(most), torch.zeros(3 * most), torch.zeros(3)
    order, entries, bounds = (one.int() for one in (order, entries, bounds))
    for runs in ([(1, 5), (2, 12), (0, 3)], [(5, 1), (1, 1), (0, 18)], [(0, 20)]):
        flat, ends = share_tiles([*runs, (0, most - rows)], 16)
        entries[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
        bounds.copy_(torch.tensor(ends, dtype=torch.int32))
        few = FewRows(16, 16, order[:rows], rows, entries, bounds, 2)
        x, bias = torch.randn(rows, 256), torch.randn(72)
        found = ops.tiles.few_rows_linear(x, layer.weight, layer.addresses, 1, few, bias)
        assert_exact(found, layer.truth(x, runs, bias))


def test_rows_of_fixed_token_tiles_are_the_equation(ops: Kernels) -> None:
    torch.manual_seed(6)
    layer = RandomLayer((72, 256), {1: 3, 2: 16, 5: 9})
    rows = 80
    order, buffer = torch.arange(rows).int(), torch.zeros(3 * 6).int()
    for runs in ([(1, 70), (2, 7), (0, 3)], [(5, 1), (1, 1), (0, 78)], [(0, 80)]):
        flat = slot_tiles(runs, 64)
        buffer.zero_()[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
        tiles = TokenTiles(order, ManyRows(16, 64, buffer, 6))
        x, bias = torch.randn(rows, 256), torch.randn(72)
        found = ops.tiles.token_rows_linear(x, layer.weight, layer.addresses, 1, tiles, bias)
        assert_exact(found, layer.truth(x, runs, bias))


def test_lora_finds_its_factors_by_address(ops: Kernels) -> None:
    torch.manual_seed(5)
    layer = RandomLayer((72, 200), {1: 3, 2: 40, 3: 128})
    slots = [1, 1, 0, 2, 3, 2]
    scales = torch.tensor([[0.0, 0.0], [9.0, 0.5], [9.0, 2.0], [9.0, 0.1]])
    x, y = torch.randn(6, 200), torch.randn(6, 72)
    wanted = y.double()
    for row, slot in enumerate(slots):
        if slot:
            a, b = (one.double() for one in layer.factors[slot])
            wanted[row] += x[row].double() @ a.t() @ b.t() * scales[slot, 1]
    rows = torch.tensor(slots, dtype=torch.int32)
    ops.tiles.add_lora_rows(y, x, rows, layer.addresses, scales, 1)
    assert_exact(y, wanted)


# What the kernels compile to, and a little more, for capabilities 8.0, 8.9 and 9.0. At rank 128 the
# sum over ranks after the loop of the one-row kernel does not quite fit; nothing else spills.
CAPABILITIES = (80, 89, 90)
COMPILED: list[tuple[str, int, dict[str, Any], tuple[Limits, Limits, Limits]]] = [
    ("scratch_weight_kernel", 8, {"R": 0}, (Limits(48, 0, 5),) * 3),
    (
        "scratch_weight_kernel", 8, {"R": 32},
        (Limits(122, 0, 2), Limits(125, 0, 2), Limits(76, 0, 3)),
    ),
    ("scratch_weight_kernel", 8, {"R": 128}, (Limits(196), Limits(182), Limits(100, 0, 2))),
    ("one_row_kernel", 4, {"R": 32}, (Limits(192, 0, 2), Limits(192, 0, 2), Limits(158, 0, 3))),
    ("one_row_kernel", 4, {"R": 64}, (Limits(196, 0, 2), Limits(196, 0, 2), Limits(199, 0, 2))),
    ("one_row_kernel", 8, {"R": 128}, (Limits(255, 72), Limits(255, 72), Limits(208))),
    (
        "expand_rows_kernel", 4, {"EACH": 33, "PLAIN": True, "BLOCK_K": 1024},
        (Limits(32, 0, 12),) * 3,
    ),
    (
        "expand_rows_kernel", 4, {"EACH": 32, "PLAIN": False, "BLOCK_K": 1024},
        (Limits(32, 0, 12),) * 3,
    ),
    (
        "contract_rows_kernel", 4, {"EACH": 33, "BLOCK_N": 256, "HAS_BIAS": True},
        (Limits(40, 0, 12),) * 3,
    ),
    (
        "lora_down_kernel", 4, {"R": 128, "BLOCK_R": 16, "BLOCK_K": 128, "EXACT": False},
        (Limits(48, 0, 5),) * 3,
    ),
    ("lora_up_kernel", 4, {"R": 128, "BLOCK_N": 256}, (Limits(38, 0, 12),) * 3),
]  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "warps", "constants", "limits"), COMPILED)
def test_kernels_fit_the_gpu(  # noqa: PLR0917
    compiled: Kernels,
    tmp_path: Path,
    capability: int,
    name: str,
    warps: int,
    constants: dict[str, Any],
    limits: tuple[Limits, Limits, Limits],
) -> None:
    own = next(one for one in OWNERS if name in OWNERS[one])
    kernel = getattr(getattr(compiled, own), name)
    constants = constants | {"COLUMNS": FACTOR_COLUMNS}
    if name == "scratch_weight_kernel":
        constants |= {"BN": compiled.scratch.WEIGHT_BLOCK, "HALF": HALF_FEATURES, "BLOCK": 64}
        constants |= {"GROUPED": True, "EXACT": False, "DECODER": lookup_assembly("nf4")}
    if name == "one_row_kernel":
        blocks = one_row_blocks(constants["R"])
        assert blocks.warps == warps
        constants |= {"BN": blocks.out, "HALF": HALF_FEATURES, "BLOCK": 64, "STAGES": blocks.stages}
        constants |= {"GROUPED": True, "EXACT": False, "DECODER": lookup_assembly("nf4")}
    binary = compile_kernel(kernel, capability, warps, constants)
    assert_within(limits[CAPABILITIES.index(capability)], binary, capability, tmp_path)
    if constants.get("R") and name in {"scratch_weight_kernel", "one_row_kernel"}:
        assert ("wgmma" if capability >= 90 else "mma.sync") in binary.asm["ptx"]
