"""Adapter folders that look like PEFT's and are not: what they are, and what to do with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from adapters.errors import UnsupportedMethod
from adapters.intake.strict_json import show

# PEFT methods that are easily taken for HiRA, by peft_type.
LOOKALIKES: Final = {
    "SHIRA": " SHiRA trains a sparse part of each weight: it is another method than HiRA.",
    "HRA": " HRA turns each weight by Householder reflections: it is another method than HiRA.",
}
AUTHORS_MARK: Final = "r_ab"  # the rank, as the HiRA authors' own code calls it
_MLX_MARKS: Final = ("lora_parameters", "fine_tune_type")


def foreign_format(content: Mapping[str, Any]) -> UnsupportedMethod | None:
    """What another program than PEFT wrote into an ``adapter_config.json``; None if PEFT did."""
    if AUTHORS_MARK in content:
        return authors_variant(content) or UnsupportedMethod(
            "This is HiRA as its authors' own code saves it, which calls itself LORA.",
            found=f"{AUTHORS_MARK} = {show(content[AUTHORS_MARK])}, "
            f"peft_type {show(content.get('peft_type'))}",
            expected="an adapter that PEFT saved",
            fix="Convert it, without loss: hira convert SOURCE DEST.",
        )
    if "peft_type" in content:
        return None
    if any(mark in content for mark in _MLX_MARKS):
        return UnsupportedMethod(
            "This is an adapter of mlx-lm, not of PEFT.",
            found=", ".join(mark for mark in _MLX_MARKS if mark in content),
            expected="an adapter_config.json with a peft_type",
            fix="Save it as PEFT does: lora_A = lora_a transposed, lora_B = lora_b transposed, "
            "lora_alpha = scale x rank.",
        )
    if isinstance(content.get("config"), dict) and "model_class" in content:
        return UnsupportedMethod(
            "This is an adapter of AdapterHub's adapters library, not of PEFT.",
            found=f"config {show(content['config'].get('architecture'))}, "
            f"model_class {show(content['model_class'])}",
            expected="an adapter_config.json with a peft_type",
            fix="Train the adapter with peft.HiraConfig or peft.LoraConfig.",
        )
    return None


def authors_variant(content: Mapping[str, Any]) -> UnsupportedMethod | None:
    """The fault of what the authors' code saved under HiRA's name and is none; else None."""
    if not content.get("rand_R"):
        return None
    return UnsupportedMethod(
        "This adapter modulates a random matrix in place of the base's weight: it is no HiRA.",
        found="rand_R = true",
        expected="rand_R = false",
        fix="Train it again with rand_R=False, or with peft.HiraConfig.",
    )
