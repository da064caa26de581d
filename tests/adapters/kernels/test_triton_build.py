"""What surrounds the fused kernel: its tiles, its PTX, and whether it fits a GPU.

No GPU is needed: the PTX that looks up levels runs here, instruction by instruction, and the
kernels are compiled with the assembler that triton carries.
"""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.kernels.nibbles import FourBitKind, level_values, lookup_assembly
from adapters.kernels.triton_operands import FACTOR_COLUMNS, HALF_FEATURES, FactorTable
from adapters.kernels.triton_tiles import (
    LARGE_SHARED_BYTES,
    WIDE_BLOCK_ROWS,
    WIDE_MAX_RANK,
    BatchTiles,
    few_blocks,
    many_blocks,
    split_inputs,
)
from adapters.segments import from_runs
from tests.stand.compiled import SHARED_BYTES, Limits, assert_within, compile_kernel
from tests.stand.interpreted import Kernels


@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 300)), min_size=1, max_size=20),
    ranks=st.lists(st.sampled_from([0, 1, 16, 17, 100]), min_size=6, max_size=6),
    wide=st.booleans(),
)
def test_tiles_hold_every_row_once_and_under_its_slot(
    runs: list[tuple[int, int]], ranks: list[int], wide: bool
) -> None:
    shape = (4, 8)
    table = FactorTable(7, [shape], torch.bfloat16, "cpu")
    for slot, rank in enumerate(ranks, start=1):
        a, b_t = (torch.zeros(rank, size, dtype=torch.bfloat16) for size in (8, 4))
        table.place(slot, {0: (a, b_t.t())} if rank else {})
    segments = from_runs(runs)
    batch = BatchTiles(segments, "cpu", wide=wide)
    launches = batch.launches(table, 0)
    assert batch.launches(table, 0) is launches
    slots = [slot if slot and ranks[slot - 1] else 0 for slot in segments.row_slots()]
    seen: list[int] = []
    for many in launches.many:
        for slot, start, count in many.tiles.view(-1, 3).tolist():
            rows = launches.rows[start : start + count].tolist()
            assert 0 < count <= many.block_rows <= (WIDE_BLOCK_ROWS if wide else 128)
            assert many.block_rows <= 128 or many.rank <= WIDE_MAX_RANK
            assert {slots[row] for row in rows} == {slot}
            assert many.rank >= (ranks[slot - 1] if slot else 0)
            assert (many.rank == 0) == (slot == 0)
            seen += rows
    few = launches.few
    if few is not None:
        owners = [0] * few.row_count
        entries = few.entries.view(-1, 3).tolist()
        assert len(few.bounds) == few.tiles + 1 == -(-few.row_count // few.block_rows) + 1
        for tile in range(few.tiles):
            for slot, first, stop in entries[few.bounds[tile] : few.bounds[tile + 1]]:
                assert 0 <= first < stop <= few.block_rows
                assert few.rank >= ranks[slot - 1] > 0
                for column in range(first, stop):
                    owners[tile * few.block_rows + column] = slot
        assert [slots[row] for row in few.rows.tolist()] == owners
        seen += few.rows.tolist()
    assert sorted(seen) == list(range(segments.rows))


@given(st.integers(1, 40_000), st.integers(1, 5_000), st.integers(1, 200))
def test_split_inputs_are_covered_without_an_empty_part(
    in_features: int, programs: int, multiprocessors: int
) -> None:
    splits, features = split_inputs(in_features, programs, multiprocessors)
    assert features % 128 == 0
    assert (splits - 1) * features < in_features <= splits * features
    assert 1 <= splits <= 16


def run_ptx(assembly: str, word: int) -> list[int]:
    """The registers $0 to $3 after the assembly has run on $4 = ``word``; prmt's default mode."""
    registers = {"$4": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in assembly.splitlines():
        match = re.fullmatch(r"(shr|and|prmt|lop3)\.b32 (\S+), (.+);", line)
        if match is None:
            assert line in "{}" or line.startswith(".reg"), line
            continue
        operands = [value(operand) for operand in match[3].split(", ")]
        if match[1] == "shr":
            result = operands[0] >> operands[1]
        elif match[1] == "and":
            result = operands[0] & operands[1]
        elif match[1] == "prmt":
            eight = struct.pack("<II", *operands[:2])
            result = 0
            for place in range(4):
                selector = operands[2] >> 4 * place & 15
                picked = eight[selector & 7]
                picked = 255 * (picked >> 7) if selector & 8 else picked
                result |= picked << 8 * place
        else:
            bits = [
                operands[3] >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1
                for a, b, c in [operands[:3]]
                for i in range(32)
            ]
            result = sum(bit << i for i, bit in enumerate(bits))
        registers[match[2]] = result
    return [registers[f"${index}"] for index in range(4)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_assembly_decodes_every_byte_in_every_place(kind: FourBitKind) -> None:
    order = list(range(256))
    random.Random(9).shuffle(order)
    levels = torch.tensor(level_values(kind)).half()
    for start in range(256):
        four = [order[(start + 61 * place) % 256] for place in range(4)]
        found = run_ptx(lookup_assembly(kind), int.from_bytes(bytes(four), "little"))
        halves = struct.unpack("<8e", struct.pack("<4I", *found))
        codes = [byte >> 4 for byte in four] + [byte & 15 for byte in four]
        assert list(halves) == levels[codes].tolist(), four


# What the kernels compile to, and a little more, by padded rank and for capabilities 8.0, 8.9 and
# 9.0. Programs of 8 warps with so many registers have a multiprocessor each; of those for few rows,
# of 4 warps, two share one, so that one loads while the other computes.
CAPABILITIES = (80, 89, 90)
MANY_LIMITS = {
    0: (Limits(255, 8), Limits(255, 24), Limits(246)),
    32: (Limits(255, 40), Limits(255, 48), Limits(255)),
    128: (Limits(255, 80), Limits(190), Limits(255)),
}
WIDE_LIMITS = {0: Limits(255), 32: Limits(255, 32), 64: Limits(255, 56)}
FEW_LIMITS = {
    (16, 32): (Limits(255, 16, 2), Limits(255, 0, 2), Limits(251, 0, 2)),
    (16, 64): (Limits(255, 56, 2), Limits(255, 64, 2), Limits(249, 0, 2)),
    (32, 128): (Limits(255, 24), Limits(255, 24), Limits(255, 16)),
}
# bitsandbytes' byte order wants a scale for each byte: it spills, and is slower for it.
LESS_SHARED_LIMITS = {(64, True): Limits(255, 48), (128, False): Limits(255, 240)}


def settings_of(grouped: bool = True) -> dict[str, Any]:
    return {
        "HALF": HALF_FEATURES,
        "BLOCK": 64,
        "GROUPED": grouped,
        "EXACT": False,
        "DECODER": lookup_assembly("nf4"),
        "COLUMNS": FACTOR_COLUMNS,
    }


def assert_fits(binary: Any, capability: int, folder: Path, limits: Limits) -> None:
    assert_within(limits, binary, capability, folder)
    # Products on the tensor cores, of bfloat16; nibbles looked up in registers.
    assert ("wgmma" if capability >= 90 else "mma.sync") in binary.asm["ptx"]
    assert "prmt.b32 plane0" in binary.asm["ptx"]


def assert_weights_stay_in_registers(binary: Any) -> None:
    """The modulated weight is the left operand of wgmma without a way through shared memory."""
    text = binary.asm["ttgir"].splitlines()
    products = [line for line in text if "warp_group_dot " in line and " * " in line]
    left = [line.split(" * ")[0].split(":")[-1] for line in products]
    # Those of B, which stays while A streams past, are in shared memory.
    assert sum("opIdx = 0" in one for one in left) == 2


@pytest.mark.parametrize("rank", MANY_LIMITS)
@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_rows_kernel_fits_the_gpu(
    compiled: Kernels, tmp_path: Path, capability: int, spare: bool, rank: int
) -> None:
    blocks = many_blocks(rank, True, SHARED_BYTES[capability])
    shape = {"BM": 128, "BN": blocks.out, "R": rank, "HAS_BIAS": True, "STAGES": blocks.stages}
    shape |= {"SPARE": spare}
    binary = compile_kernel(
        compiled.tiles.many_rows_kernel, capability, blocks.warps, shape | settings_of()
    )
    limits = MANY_LIMITS[rank][CAPABILITIES.index(capability)]
    assert_fits(binary, capability, tmp_path, limits)
    if capability >= 90:
        assert_weights_stay_in_registers(binary)
    # The rows, W0 and A stream past while the tensor cores work.
    assert binary.asm["ttgir"].count("async_copy_global_to_local") > 4


@pytest.mark.parametrize("rank", WIDE_LIMITS)
def test_wide_tiles_fit_the_gpu(compiled: Kernels, tmp_path: Path, rank: int) -> None:
    assert max(WIDE_LIMITS) == WIDE_MAX_RANK
    blocks = many_blocks(rank, True, SHARED_BYTES[90], WIDE_BLOCK_ROWS)
    shape = {"BM": WIDE_BLOCK_ROWS, "BN": blocks.out, "R": rank, "HAS_BIAS": True}
    shape |= {"STAGES": blocks.stages, "SPARE": False}
    binary = compile_kernel(
        compiled.tiles.many_rows_kernel, 90, blocks.warps, shape | settings_of()
    )
    assert_fits(binary, 90, tmp_path, WIDE_LIMITS[rank])
    assert_weights_stay_in_registers(binary)


@pytest.mark.parametrize(("rank", "grouped"), LESS_SHARED_LIMITS)
def test_many_rows_kernel_fits_a_gpu_with_less_shared_memory(
    compiled: Kernels, tmp_path: Path, rank: int, grouped: bool
) -> None:
    assert SHARED_BYTES[89] < LARGE_SHARED_BYTES
    blocks = many_blocks(rank, grouped, SHARED_BYTES[89])
    shape = {"BM": 128, "BN": blocks.out, "R": rank, "HAS_BIAS": False, "STAGES": blocks.stages}
    shape |= {"SPARE": False}
    binary = compile_kernel(
        compiled.tiles.many_rows_kernel, 89, blocks.warps, shape | settings_of(grouped)
    )
    assert_fits(binary, 89, tmp_path, LESS_SHARED_LIMITS[rank, grouped])


@pytest.mark.parametrize(("rows", "rank"), FEW_LIMITS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_few_rows_kernel_fits_the_gpu(
    compiled: Kernels, tmp_path: Path, capability: int, rows: int, rank: int
) -> None:
    blocks = few_blocks(rank)
    shape = {"BM": rows, "BN": blocks.out, "R": rank, "STAGES": blocks.stages}
    binary = compile_kernel(
        compiled.tiles.few_rows_kernel, capability, blocks.warps, shape | settings_of()
    )
    limits = FEW_LIMITS[rows, rank][CAPABILITIES.index(capability)]
    assert_fits(binary, capability, tmp_path, limits)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_small_kernels_fit_the_gpu(compiled: Kernels, tmp_path: Path, capability: int) -> None:
    sums = {"BLOCK_N": compiled.tiles.SUM_BLOCK_FEATURES, "HAS_BIAS": True}
    decode = {"DECODER": lookup_assembly("fp4")}
    for kernel, constants, most in (
        (compiled.tiles.sum_parts_kernel, sums, 34),
        (compiled.tiles.decode_bytes_kernel, decode, 22),
    ):
        binary = compile_kernel(kernel, capability, 4, constants)
        assert_within(Limits(most, 0, 12), binary, capability, tmp_path)
