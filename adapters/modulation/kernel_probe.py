"""Whether the GPU kernels are right on this device: each is tried before it computes an answer.

When the layers are made, small layers run by the fused kernel and by each other form of the
equation; what fails, or is off float64, is said in the log in one line and never used. On a device
these layers are as awkward as real ones: sizes that fill no block, both orders of the 4-bit codes,
both kinds of levels, the smallest and the largest rank, several adapters beside the base.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from adapters.errors import in_a_line
from adapters.kernels import reference
from adapters.kernels.nibbles import FourBitKind
from adapters.kernels.triton_operands import KERNEL_DTYPES, FactorTable
from adapters.kernels.triton_tiles import MANY_BLOCK_ROWS, WIDE_MAX_RANK, BatchTiles, padded_rank
from adapters.modulation.form_agreement import FORM_TOLERANCE, row_difference
from adapters.modulation.gpu_kernels import (
    expanded_kernels,
    row_kernels,
    scratch_kernels,
    tile_kernels,
)
from adapters.modulation.packed_layers import packed_layers
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.strategy import Computation
from adapters.segments import BASE_SLOT, from_runs

LEAST_CAPABILITY: Final = (8, 0)  # the kernels are compiled, in tests, for 8.0 to 9.0
WIDE_CAPABILITY: Final = (9, 0)
FORMS_BESIDE_TILES: Final[tuple[Computation, ...]] = (
    *("product", "expanded", "scratch", "row", "wide"),
)


@dataclass(frozen=True, slots=True)
class ProbeCase:
    """A random layer, and how many rows of its first adapter are many.

    Args:
        shape: ``(out, in)``; the codes are grouped where ``in`` is a multiple of 128.
        kind: Of the levels.
        ranks: Of the adapters in slots 1, 2, ...
        many: Rows, at most 128.
        biased: It has a bias.
    """

    shape: tuple[int, int]
    kind: FourBitKind
    ranks: tuple[int, int]
    many: int
    biased: bool


# 160 outputs fill no block of 64 or 128, and 1,376 inputs no group of 128.
DEVICE_CASES: Final = (
    ProbeCase((160, 1408), "nf4", (1, 16), 100, biased=True),
    ProbeCase((160, 1376), "fp4", (128, 7), 100, biased=False),
)
# Where a kernel takes seconds for what a device does in microseconds.
INTERPRETED_CASES: Final = (ProbeCase((24, 128), "nf4", (16, 3), 32, biased=True),)

logger = logging.getLogger(__name__)


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused kernel cannot run on a device in a compute dtype; None when it can.

    The first call for a device runs the kernel once on a small layer (and compiles it) and compares
    its answer with float64: where it would be wrong, it is not used.
    """
    if dtype not in KERNEL_DTYPES:
        return f"compute dtype {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        ops = tile_kernels()
    except Exception as cause:  # noqa: BLE001  # triton's own import: a library, a driver
        logger.warning("Triton cannot be imported, torch computes: %s", in_a_line(cause))
        return f"{type(cause).__name__} when triton is imported"
    if device.type != "cuda":
        return None if ops.INTERPRETED else f"device {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < LEAST_CAPABILITY:
        return f"a device of capability {capability[0]}.{capability[1]}"
    return _probed(dtype, device)


@lru_cache(maxsize=8)
def _probed(dtype: torch.dtype, device: torch.device) -> str | None:
    logger.info("Compiling the fused kernel and comparing it with float64 on %s", device)
    try:
        error = _worst_probe_error(dtype, device, "tiles")
    except Exception as cause:  # a compiler, a driver: whatever fails, torch serves
        logger.warning("The fused kernel failed its probe, torch computes: %s", in_a_line(cause))
        logger.debug("Where it failed", exc_info=True)
        return f"{type(cause).__name__} in its probe"
    return None if error <= FORM_TOLERANCE else f"a relative error of {error:.2g} in its probe"


@lru_cache(maxsize=8)
def proved_forms(dtype: torch.dtype, device: torch.device) -> frozenset[Computation]:
    """The forms beside the fused kernel that were right on small batches on this device.

    Each is compiled and run once, the first time that this is asked for a device; what fails, or is
    wrong, is said in the log and never timed. Takes seconds on a device where Triton's own cache
    has none of the kernels.
    """
    began = time.monotonic()
    logger.info("Compiling the other forms of the kernels and comparing them with float64")
    proved: list[Computation] = []
    for form in FORMS_BESIDE_TILES:
        if form == "wide" and not _has_wide(device):
            continue
        try:
            error = _worst_probe_error(dtype, device, form)
        except Exception as cause:  # a compiler, a driver, a library: the fused kernel serves
            logger.warning("The form %s failed its probe: %s", form, in_a_line(cause))
            logger.debug("Where it failed", exc_info=True)
            continue
        if error <= FORM_TOLERANCE:
            proved.append(form)
        else:
            logger.warning("The form %s is off by %.2g in its probe: not used", form, error)
    logger.info(
        "Forms that may be timed with the fused kernel: %s (%.1f s)",
        ", ".join(proved) or "none",
        time.monotonic() - began,
    )
    return frozenset(proved)


def _has_wide(device: torch.device) -> bool:
    """Whether blocks of twice the rows fit the registers: by what the compiler says in tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= WIDE_CAPABILITY


def _worst_probe_error(dtype: torch.dtype, device: torch.device, form: Computation) -> float:
    cases: Sequence[ProbeCase] = DEVICE_CASES if device.type == "cuda" else INTERPRETED_CASES
    if form == "wide":  # which larger ranks have no registers for
        cases = [one for one in cases if max(one.ranks) <= WIDE_MAX_RANK]
    return max(probe_error(dtype, device, form, case) for case in cases)


def probe_error(
    dtype: torch.dtype, device: torch.device, form: Computation, case: ProbeCase
) -> float:
    """The largest relative error of a mixed batch, few rows and many, against float64.

    Args:
        dtype: To compute in.
        device: Where.
        form: What computes.
        case: A layer; the batch is of two adapters and the base, as the form takes rows.
    """
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        out_features, in_features = case.shape
        dense = random(*case.shape) * 0.2
        weight = QuantizedWeight.from_dense(dense, case.kind, double_quant=False)
        w0 = weight.dequantize(dtype=torch.float32)
        packed = packed_layers({"": weight})[""]
        table = FactorTable(len(case.ranks) + 1, [case.shape], dtype, device)
        factors = {}
        for slot, rank in enumerate(case.ranks, start=1):
            factors[slot] = (random(rank, in_features), random(rank, out_features).t())
            table.place(slot, {0: factors[slot]})
        runs = [(1, case.many), (2, 3), (BASE_SLOT, 2)]
        if form in {"product", "expanded"}:  # for few rows: many would only take longer
            runs = [(1, 4), (2, 2), (BASE_SLOT, 2)]
        elif form == "row":
            runs = [(1, 1)]
        elif form == "wide":
            runs = [(1, MANY_BLOCK_ROWS + 5), (2, 3)]
        segments = from_runs(runs)
        x, bias = random(segments.rows, in_features), None
        if case.biased:
            bias = random(out_features)
        where = (packed, table.addresses, 0)
        rank = padded_rank(max(case.ranks))
        slots = torch.tensor(segments.row_slots(), dtype=torch.int32).to(device)
        order = torch.arange(len(slots), dtype=torch.int32, device=device)

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        if form == "product":
            found = scratch_kernels().product_linear(
                x, *where, slots, rank=rank, take=take, bias=bias
            )
        elif form == "expanded":
            found = expanded_kernels().expanded_linear(
                x, *where, slots, rank=rank, order=order, take=take, bias=bias
            )
        elif form == "scratch":
            padded = (0, *map(padded_rank, case.ranks))
            pieces = [
                (part.slot, padded[part.slot], part.start, part.stop) for part in segments.parts
            ]
            found = scratch_kernels().scratch_linear(x, *where, pieces, take=take, bias=bias)
        elif form == "row":
            found = row_kernels().one_row_linear(
                x, *where, slots, rank=rank, first_row=order, bias=bias
            )
        else:
            tiles = BatchTiles(segments, device, wide=form == "wide")
            found = tile_kernels().hira_linear(x, packed, table, 0, tiles, bias=bias)
        truth = reference.modulated_linear(
            x,
            w0,
            {slot: ("hira", a, b, 1.0, None) for slot, (a, b) in factors.items()},
            segments,
            bias,
        )
        off = row_difference(found, truth)
        return math.inf if off is None else off
