"""Kernels compiled for a GPU that is not there, and what the assembler says of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Shared memory that a program may take, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# Of a multiprocessor: registers, threads, shared memory; a program takes 1 KiB more of the last.
_REGISTERS = 64 * 1024
_THREADS = {80: 2048, 89: 1536, 90: 2048}
_SHARED_BYTES = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
TYPES = {
    "x_ptr": "*bf16",
    "y_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "packed_ptr": "*u8",
    "level_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "part_ptr": "*fp32",
    "table_ptr": "*i64",
    "out_ptr": "*bf16",
    "z_ptr": "*bf16",
    "e_ptr": "*fp32",
    "inner_ptr": "*fp32",
    "slots_ptr": "*i32",
    "rows_ptr": "*i32",
    "tiles_ptr": "*i32",
    "entries_ptr": "*i32",
    "bounds_ptr": "*i32",
    "byte_ptr": "*u8",
    "found_ptr": "*fp16",
}


def nvidia_tool(name: str) -> Path:
    spec = importlib.util.find_spec("triton.backends.nvidia")
    assert spec is not None
    folders = spec.submodule_search_locations
    assert folders is not None
    return Path(folders[0]) / "bin" / name


def compile_kernel(kernel: Any, capability: int, warps: int, constants: dict[str, Any]) -> Any:
    """The kernel as a launch on aligned tensors and a layer of round sizes compiles it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    loose = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    loose |= {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in loose
    }
    return compile_source(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a kernel may take, and how many of its programs a multiprocessor must hold at once.

    A thread has 255 registers at the most: at that limit it is ``spill`` that can grow.

    Args:
        registers: Of a thread.
        spill: Bytes of registers that did not fit, of a thread.
        programs: At least.
    """

    registers: int
    spill: int = 0
    programs: int = 1


def assert_within(limits: Limits, binary: Any, capability: int, folder: Path) -> None:
    """What the assembler made of a kernel is within its limits, and within the device's."""
    assert binary.metadata.shared <= SHARED_BYTES[capability]
    registers, spill = registers_and_spill(binary.asm["cubin"], folder)
    threads = 32 * binary.metadata.num_warps
    programs = min(
        _REGISTERS // (-(-registers // 8) * 8 * threads),
        _THREADS[capability] // threads,
        _SHARED_BYTES[capability] // (binary.metadata.shared + 1024),
    )
    assert registers <= limits.registers, f"{registers} registers, {spill} bytes spilled"
    assert spill <= limits.spill, f"{registers} registers, {spill} bytes spilled"
    assert programs >= limits.programs, f"{programs} programs, {registers} registers"


def registers_and_spill(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers a thread, and bytes of them that did not fit."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(nvidia_tool("cuobjdump")), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])
