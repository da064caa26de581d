"""The kernel for expanded rows: against float64, and as it is compiled for a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels.nibbles import lookup_assembly
from adapters.kernels.triton_operands import FACTOR_COLUMNS, HALF_FEATURES
from adapters.kernels.triton_tiles import EXPANDED_COLUMNS, expanded_blocks, padded_rank
from tests.stand.compiled import SHARED_BYTES, Limits, assert_within, compile_kernel
from tests.stand.interpreted import (
    Kernels,
    RandomLayer,
    assert_exact,
    filled_with_nan,
)

pytest.importorskip("triton", reason="triton is not installed")

# What the kernel compiles to, and a little more, by rank and for capabilities 8.0, 8.9 and 9.0. At
# rank 128 what follows the loop does not quite fit.
CAPABILITIES = (80, 89, 90)
LIMITS = {
    32: (Limits(221), Limits(188), Limits(218)),
    128: (Limits(255, 24), Limits(255, 64), Limits(255, 64)),
}


def answer(  # noqa: PLR0917
    ops: Kernels, layer: RandomLayer, x: torch.Tensor, slots: list[int], rank: int, bias: Any
) -> torch.Tensor:
    found: torch.Tensor = ops.expanded.expanded_linear(
        x, layer.weight, layer.addresses, 1, torch.tensor(slots, dtype=torch.int32),
        rank=rank, order=torch.arange(len(slots), dtype=torch.int32), take=filled_with_nan,
        bias=bias,
    )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("shape", "ranks", "kind"),
    [
        ((136, 256), (3, 16, 9), "nf4"),  # several rows and slots of a program, two blocks of out
        ((40, 640), (30, 5, 32), "nf4"),  # its inputs split over programs
        ((40, 96), (64, 33, 1), "fp4"),  # bytes in bitsandbytes' order
        ((72, 128), (128, 2, 100), "fp4"),  # a row fills a program
    ],
)
def test_any_batch_agrees_with_float64(
    ops: Kernels, shape: tuple[int, int], ranks: tuple[int, ...], kind: Any
) -> None:
    torch.manual_seed(sum(ranks))
    chance = random.Random(shape[0])
    layer = RandomLayer(shape, {1: ranks[0], 2: ranks[1], 4: ranks[2]}, kind)
    rank = padded_rank(max(ranks))
    # Slot 3 has nothing in this layer; the last tile is not full.
    slots = [1, 2, 0, 3, 4, *(chance.randint(0, 4) for _ in range(chance.randint(0, 2)))]
    x, bias = torch.randn(len(slots), shape[1]), torch.randn(shape[0])
    found = answer(ops, layer, x, slots, rank, bias)
    assert_exact(found, layer.truth(x, [(slot, 1) for slot in slots], bias))
    last = len(slots) - 1
    alone = answer(ops, layer, x[last:], slots[last:], rank, None)
    assert_exact(alone, layer.truth(x[last:], [(slots[last], 1)], None))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_an_adapter_that_overflows_stays_in_its_rows(ops: Kernels) -> None:
    torch.manual_seed(3)
    layer = RandomLayer((72, 256), {1: 16, 2: 4, 3: 8})
    layer.factors[1][0].fill_(float("inf"))
    layer.factors[3][1].fill_(float("nan"))
    x, slots = torch.randn(5, 256), [1, 2, 0, 3, 2]
    found = answer(ops, layer, x, slots, 16, None)
    good = [1, 2, 4]
    truth = layer.truth(x[good], [(slots[row], 1) for row in good], None)
    assert_exact(found[good], truth)
    assert not torch.isfinite(found[[0, 3]]).any()


@pytest.mark.parametrize("rank", LIMITS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_fits_the_gpu_with_weights_in_registers(
    compiled: Kernels, tmp_path: Path, capability: int, rank: int
) -> None:
    blocks = expanded_blocks(SHARED_BYTES[capability])
    constants = {
        "TOKENS": EXPANDED_COLUMNS // rank, "BN": blocks.out, "HALF": HALF_FEATURES, "R": rank,
        "BLOCK": 64, "GROUPED": True, "EXACT": False, "DECODER": lookup_assembly("nf4"),
        "COLUMNS": FACTOR_COLUMNS, "STAGES": blocks.stages, "HALVINGS": rank.bit_length() - 1,
    }  # fmt: skip
    kernel = compiled.expanded.expanded_rows_kernel
    binary = compile_kernel(kernel, capability, blocks.warps, constants)
    assert_within(LIMITS[rank][CAPABILITIES.index(capability)], binary, capability, tmp_path)
    # Decoded weights are operands where they are: nothing writes them to shared memory.
    products = [
        line for line in binary.asm["ttgir"].splitlines() if "dot" in line and " * " in line
    ]
    assert len(products) == 4
    assert all("opIdx = 0" in line.split(" * ")[0].split(":")[-1] for line in products)
    # The expanded rows stream past meanwhile.
    assert binary.asm["ttgir"].count("async_copy_global_to_local") > 2
