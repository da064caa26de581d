"""The compiled CPU kernel: all segments of one layer call in one pass over W0.

It is built at install where there is a compiler (``adapters/kernels/native``), once for all
instruction sets, and takes the best that the processor has: in bfloat16 AMX-BF16 or AVX512-BF16, in
float32 AVX512 or AVX2 with FMA. Where it has none for a dtype ``available`` is False and torch does
the work. It runs in the threads of torch's own OpenMP pool and allocates nothing of size: the
caller lends it a scratch buffer.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from adapters.kernels.nibbles import level_values
from adapters.segments import Segments

# The best instruction set to use; each leaves out what stands before it. ``none``: no kernel.
Level = Literal["best", "avx512", "avx2", "none"]
NativeComputation = Literal["base", "fold", "expand", "kept"]
InstructionSet = Literal["amx", "avx512_bf16", "avx512", "avx2"]

# What the library's numbers mean, by the dtype.
_SETS: dict[torch.dtype, tuple[InstructionSet, ...]] = {
    torch.bfloat16: ("avx512_bf16", "amx"),
    torch.float32: ("avx2", "avx512"),
}
# The most of them that a level allows.
_MOST: dict[torch.dtype, dict[Level, int]] = {
    torch.bfloat16: {"best": 2, "avx512": 1, "avx2": 0, "none": 0},
    torch.float32: {"best": 2, "avx512": 2, "avx2": 1, "none": 0},
}
_HOWS: dict[NativeComputation, int] = {"base": 0, "fold": 1, "expand": 2, "kept": 3}
# As hira_cpu.cpp: its interface, and its structures, whose every field is eight bytes.
_INTERFACE = 3
_CALL = struct.Struct("15q")
_FACTORS = struct.Struct("4q")
_CHOICE = struct.Struct("2q")
_RECORD_BYTES = _FACTORS.size + _CHOICE.size
_ALIGNMENT_BYTES = 64
INPUTS_MULTIPLE = 32

AS_BASE, AS_FOLD, AS_EXPAND = (_CHOICE.pack(_HOWS[how], 0) for how in ("base", "fold", "expand"))
BARE = _FACTORS.pack(0, 0, 0, 0)  # of no factors
BASE_RECORD = BARE + AS_BASE


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("hira_cpu*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.hira_interface.restype = ctypes.c_int32
            if library.hira_interface() != _INTERFACE:  # left over from another version
                continue
            for level in (library.hira_level, library.hira_level_float32):
                level.restype = ctypes.c_int32
            for run in (library.hira_modulated_linear, library.hira_modulated_linear_float32):
                run.restype = ctypes.c_int64
                run.argtypes = [ctypes.c_char_p] * 3
        except (OSError, AttributeError):  # of another machine, or too old to say
            continue
        return library
    return None


class _Limit:
    """What ``limited_to`` set, for all of this process."""

    level: Level = "best"


@contextmanager
def limited_to(level: Level) -> Iterator[None]:
    """Use no better instruction set than ``level`` in all of this process, as long as it lasts."""
    before, _Limit.level = _Limit.level, level
    try:
        yield
    finally:
        _Limit.level = before


def _level(dtype: torch.dtype, level: Level = "best") -> int:
    """The number of the instruction set to use; 0 where there is none."""
    library = _library()
    if library is None or dtype not in _MOST:
        return 0
    is_float32 = dtype == torch.float32
    best = library.hira_level_float32() if is_float32 else library.hira_level()
    return min(int(best), _MOST[dtype][level], _MOST[dtype][_Limit.level])


@lru_cache(maxsize=1)
def _parallel() -> int:
    """The address of GOMP_parallel in the very runtime that torch uses, or 0: then one thread."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A look-up in a library also searches those that it is linked with.
        symbol = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(symbol, ctypes.c_void_p).value or 0


@lru_cache(maxsize=2)
def _level_array(kind: Literal["nf4", "fp4"]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 16)(*level_values(kind))


@lru_cache(maxsize=1)
def _library_digest() -> str:
    library = _library()
    assert library is not None
    return hashlib.sha256(Path(library._name).read_bytes()).hexdigest()[:16]


def digest() -> str | None:
    """Of the compiled library and of what this processor runs of it; None where there is none."""
    if _library() is None:
        return None
    found = [instruction_set(dtype) or "none" for dtype in _SETS]
    return " ".join((_library_digest(), *found))


def instruction_set(dtype: torch.dtype) -> InstructionSet | None:
    """What the kernel runs on in ``dtype`` here; None where it is not built or has nothing."""
    level = _level(dtype)
    return _SETS[dtype][level - 1] if level else None


def available(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernel is built and this processor can run it in ``dtype``."""
    return _level(dtype) > 0


def takes_weight(kind: str, shape: tuple[int, int], block: int) -> bool:
    """Whether a 4-bit weight of this shape can be read as it is stored."""
    return (
        kind in ("nf4", "fp4")
        and shape[1] % INPUTS_MULTIPLE == 0
        and block % INPUTS_MULTIPLE == 0
        and block > 0
    )


def record(
    a: torch.Tensor | None, b: torch.Tensor | None, bias: torch.Tensor | None
) -> bytes | None:
    """What the kernel reads of one adapter in one layer; valid while the tensors live.

    ``AS_BASE``, ``AS_FOLD``, ``AS_EXPAND`` or ``as_kept`` is to be put behind it.

    Args:
        a: ``[r, in]``, or None for rows that get the bare base.
        b: ``[out, r]``, or None.
        bias: ``[out]`` instead of the layer's own, or None.

    Returns:
        None where the kernel cannot read them: neither all bfloat16 nor all float32, not
        contiguous, not on the CPU.
    """
    there = [tensor for tensor in (a, b, bias) if tensor is not None]
    for tensor in there:
        if not (
            tensor.dtype in _SETS
            and tensor.dtype == there[0].dtype
            and tensor.is_contiguous()
            and tensor.device.type == "cpu"
        ):
            return None
    own = 0 if bias is None else bias.data_ptr()
    if a is None or b is None:
        return _FACTORS.pack(0, 0, own, 0)
    return _FACTORS.pack(a.data_ptr(), b.data_ptr(), own, a.shape[0])


def as_kept(folded: torch.Tensor) -> bytes:
    """The choice to use ``folded``: ``[out, in]``, contiguous, as x in dtype, to be kept alive."""
    return _CHOICE.pack(_HOWS["kept"], folded.data_ptr())


def pack_bounds(segments: Segments) -> bytes:
    """Where segments start and end, as ``modulated_linear_into`` takes them."""
    return struct.pack(f"{len(segments.parts) + 1}q", 0, *(part.stop for part in segments.parts))


def modulated_linear_into(
    y: torch.Tensor,
    x: torch.Tensor,
    *,
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    kind: Literal["nf4", "fp4", "int8", "dense"],
    block: int,
    bias: torch.Tensor | None,
    bounds: bytes,
    records: bytes,
    scratch: Callable[[int], torch.Tensor],
    level: Level = "best",
) -> None:
    """y[rows of s] = x[rows of s] · (W0 ⊙ (1 + B_s A_s))ᵀ + bias for every segment s; writes ``y``.

    In float32 all is computed in float32. In bfloat16 W0 is rounded to bfloat16, as a dequantized
    weight is; W0 ⊙ (1 + BA), or A ⊙ x where a segment has few rows, is rounded once more; sums are
    in float32.

    Args:
        y: bfloat16 or float32 ``[rows, out]``, contiguous.
        x: ``[rows, in]``, contiguous, in the dtype of ``y``; ``in`` a multiple of 32.
        stored: As ``QuantizedWeight.stored``; dense: ``[out, in]`` in that dtype, contiguous.
        scales: float32, one a block, of a 4-bit weight.
        kind: How ``stored`` encodes W0; int8 is not read.
        block: Weights a scale, of a 4-bit weight for which ``takes_weight`` holds.
        bias: ``[out]`` in that dtype, or None.
        bounds: Of ``pack_bounds``.
        records: Of ``record``, in that dtype, and a choice behind it, one a segment, joined.
        scratch: Gives a uint8 buffer of at least so many bytes, which is overwritten.
        level: Forces a lesser instruction set than the processor has.

    Raises:
        ValueError: The kernel does not serve this shape; nothing is written.
    """
    library = _library()
    assert library is not None
    out_features, in_features = y.shape[1], x.shape[1]
    scale_address = levels_address = 0
    if kind != "dense":
        assert scales is not None
        assert kind != "int8"
        scale_address = scales.data_ptr()
        levels_address = ctypes.addressof(_level_array(kind))
    number = _level(y.dtype, level)
    is_float32 = y.dtype == torch.float32
    run = library.hira_modulated_linear_float32 if is_float32 else library.hira_modulated_linear
    buffer = scratch(_ALIGNMENT_BYTES)
    parallel = _parallel()
    threads = torch.get_num_threads() if parallel else 1
    while True:
        start = -(-buffer.data_ptr() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        call = _CALL.pack(
            y.data_ptr(), x.data_ptr(), stored.data_ptr(), scale_address, levels_address,
            0 if bias is None else bias.data_ptr(), len(records) // _RECORD_BYTES,
            out_features, in_features, block, threads,
            start, buffer.data_ptr() + buffer.numel() - start, parallel, number,
        )  # fmt: skip
        needed = run(call, bounds, records) if number else -1
        if needed == 0:
            return
        if needed < 0:
            raise ValueError(f"The compiled kernel does not serve {tuple(y.shape)} of {kind}.")
        buffer = scratch(needed + _ALIGNMENT_BYTES)
