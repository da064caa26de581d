"""Whether the GPU kernels are right on this device: each is tried before it computes an answer.

A small layer runs once by the fused kernel when the server starts, and by each other form of the
equation when that is first wanted; what fails, or is off float64, is said in the log in one line
and never used.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Final

import torch

from adapters.kernels import reference
from adapters.kernels.triton_operands import KERNEL_DTYPES, FactorTable
from adapters.kernels.triton_tiles import MANY_BLOCK_ROWS, BatchTiles
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
# Relative to the largest answer: bfloat16 rounds by 2⁻⁸.
PROBE_TOLERANCE: Final = 2e-2

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
    ops = tile_kernels()
    if device.type != "cuda":
        return None if ops.INTERPRETED else f"device {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < LEAST_CAPABILITY:
        return f"a device of capability {capability[0]}.{capability[1]}"
    return _probed(dtype, device)


@lru_cache(maxsize=8)
def _probed(dtype: torch.dtype, device: torch.device) -> str | None:
    try:
        error = probe_error(dtype, device)
    except Exception as cause:  # a compiler, a driver: whatever fails, torch serves
        logger.warning("The fused kernel failed its probe, torch computes: %s", _in_a_line(cause))
        logger.debug("Where it failed", exc_info=True)
        return f"{type(cause).__name__} in its probe"
    return None if error <= PROBE_TOLERANCE else f"a relative error of {error:.2g} in its probe"


@lru_cache(maxsize=8)
def proved_forms(dtype: torch.dtype, device: torch.device) -> frozenset[Computation]:
    """The forms beside the fused kernel that were right on a small batch on this device.

    Each is run once, and compiled; what fails, or is wrong, is said in the log and never timed.
    """
    proved: set[Computation] = set()
    forms: tuple[Computation, ...] = ("product", "expanded", "scratch", "row", "wide")
    for form in forms:
        if form == "wide" and not _has_wide(device):
            continue
        try:
            error = probe_error(dtype, device, form)
        except Exception as cause:  # a compiler, a driver, a library: the fused kernel serves
            logger.warning("The form %s failed its probe: %s", form, _in_a_line(cause))
            logger.debug("Where it failed", exc_info=True)
            continue
        if error <= PROBE_TOLERANCE:
            proved.add(form)
        else:
            logger.warning("The form %s is off by %.2g in its probe: not used", form, error)
    return frozenset(proved)


def _has_wide(device: torch.device) -> bool:
    """Whether blocks of twice the rows fit the registers: by what the compiler says in tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= WIDE_CAPABILITY


def probe_error(dtype: torch.dtype, device: torch.device, form: Computation = "tiles") -> float:
    """The largest relative error of a small mixed batch, few rows and many, against float64."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        weight = QuantizedWeight.from_dense(random(64, 256) * 0.2, "nf4", double_quant=False)
        w0 = weight.dequantize(dtype=torch.float32)
        packed = packed_layers({"": weight})[""]
        table = FactorTable(3, [weight.shape], dtype, device)
        factors = {slot: (random(16, 256), random(16, 64).t()) for slot in (1, 2)}
        for slot, (a, b) in factors.items():
            table.place(slot, {0: (a, b)})
        runs = [(1, 40), (2, 3), (BASE_SLOT, 2)]
        if form in {"product", "expanded"}:  # for few rows: many would only take longer
            runs = [(1, 4), (2, 3), (BASE_SLOT, 2)]
        elif form == "row":
            runs = [(2, 1)]
        elif form == "wide":
            runs = [(1, MANY_BLOCK_ROWS + 5), (2, 3)]
        segments = from_runs(runs)
        x, bias = random(segments.rows, 256), random(64)
        where = (packed, table.addresses, 0)

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        if form == "product":
            slots = torch.tensor(segments.row_slots(), dtype=torch.int32).to(device)
            found = scratch_kernels().product_linear(
                x, *where, slots, rank=16, take=take, bias=bias
            )
        elif form == "expanded":
            slots = torch.tensor(segments.row_slots(), dtype=torch.int32).to(device)
            order = torch.arange(len(slots), dtype=torch.int32, device=device)
            found = expanded_kernels().expanded_linear(
                x, *where, slots, rank=16, order=order, take=take, bias=bias
            )
        elif form == "scratch":
            pieces = [
                (part.slot, 0 if part.slot == BASE_SLOT else 16, part.start, part.stop)
                for part in segments.parts
            ]
            found = scratch_kernels().scratch_linear(x, *where, pieces, take=take, bias=bias)
        elif form == "row":
            zero, two = (torch.tensor([one], dtype=torch.int32).to(device) for one in (0, 2))
            found = row_kernels().one_row_linear(x, *where, two, rank=16, first_row=zero, bias=bias)
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
        return float((found.double() - truth).abs().max() / truth.abs().max())


def _in_a_line(cause: Exception) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]
