"""The names of tensors in an adapter file: which factor of which layer, or which part of a head.

PEFT writes ``base_model.model.<module path>.hira_A`` and the like. This module only reads names;
whether the layer exists and the shape fits is decided by ``checkpoint``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from adapters.config import Method

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<method>hira|lora)_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.default)?(?P<weight>\.weight)?"
)
_BIAS = ".base_layer.bias"
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")


@dataclass(frozen=True, slots=True)
class FactorKey:
    """``side`` of the factors of the module at ``path``, as the file spells it."""

    path: str
    method: Method
    side: Literal["A", "B"]
    embedding: bool


@dataclass(frozen=True, slots=True)
class SavedKey:
    """A tensor of a module that was saved whole: a task head, normally."""

    path: str
    parameter: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class BiasKey:
    """The bias of a target that was trained with its factors (LoRA's ``bias="lora_only"``)."""

    path: str


def parse_key(name: str) -> FactorKey | BiasKey | SavedKey | None:
    """What the tensor ``name`` is; None when it is nothing that an adapter has.

    Source: ``peft/utils/save_and_load.py``, ``get_peft_model_state_dict``.
    """
    if not name.startswith(PREFIX):
        return None
    rest = name[len(PREFIX) :]
    found = _FACTOR.fullmatch(rest)
    if found is not None:
        method: Method = "hira" if found["method"] == "hira" else "lora"
        # LoRA's factors are modules with a weight, except those of embeddings; HiRA's never are.
        if (found["weight"] is not None) != (method == "lora" and found["embedding"] is None):
            return None
        side: Literal["A", "B"] = "A" if found["side"] == "A" else "B"
        return FactorKey(found["path"], method, side, found["embedding"] is not None)
    if rest.endswith(_BIAS):
        return BiasKey(rest.removesuffix(_BIAS))
    path, dot, parameter = _SAVED.sub("", rest).rpartition(".")
    if not dot or any(
        part.startswith(("hira_", "lora_")) for part in (*path.split("."), parameter)
    ):
        return None
    return SavedKey(path, parameter)
