"""What the sixteen 4-bit codes stand for, and how a GPU looks them up in registers.

A table of sixteen float16 levels is two planes of sixteen bytes, and ``prmt`` (PTX ISA, "byte
permute") picks four of eight bytes at once: about 3 instructions a weight, where a tree of
selections takes 19 and a table in memory a load.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Literal

import torch

FourBitKind = Literal["nf4", "fp4"]


@lru_cache(maxsize=2)
def level_values(kind: FourBitKind) -> tuple[float, ...]:
    """The value of each code in bitsandbytes' ``kind``, of magnitude 1 at most."""
    from bitsandbytes import functional

    with torch.inference_mode(False):
        levels: list[float] = functional.get_4bit_type(kind, device="cpu").tolist()
    return tuple(levels)


@lru_cache(maxsize=2)
def lookup_assembly(kind: FourBitKind) -> str:
    """PTX that decodes four bytes: ``$4``, the first byte lowest, to eight float16.

    ``$0``, ``$1`` take the levels of the four high nibbles, in order, two a register; ``$2``,
    ``$3`` those of the low ones. A level is rounded to float16: by 2⁻¹², an eighth of what bfloat16
    rounds.
    """
    pairs = [struct.pack("<e", level) for level in level_values(kind)]
    lines = ["{", ".reg .b32 word, index, upper, plane0, plane1, other;"]
    for half in range(2):
        lines += [
            # Four codes, from the lowest: low and high nibble of one byte, then of the next.
            f"shr.b32 word, $4, {16 * half};",
            "and.b32 index, word, 0x7777;",
            # Bytes of ones where a code is 8 or more.
            "shr.b32 upper, word, 1;",
            "and.b32 upper, upper, 0x4444;",
            "prmt.b32 upper, 0, 0xffffffff, upper;",
        ]
        for plane in range(2):
            words = [
                int.from_bytes(bytes(pair[plane] for pair in pairs[start : start + 4]), "little")
                for start in range(0, 16, 4)
            ]
            lines += [
                f"prmt.b32 plane{plane}, {words[0]:#x}, {words[1]:#x}, index;",
                f"prmt.b32 other, {words[2]:#x}, {words[3]:#x}, index;",
                # (plane & ~upper) | (other & upper)
                f"lop3.b32 plane{plane}, plane{plane}, other, upper, 0xd8;",
            ]
        lines += [
            f"prmt.b32 ${half}, plane0, plane1, 0x7351;",
            f"prmt.b32 ${half + 2}, plane0, plane1, 0x6240;",
        ]
    return "\n".join([*lines, "}"])
