"""The names of tensors in an adapter file: which factor of which layer, or which part of a head.

PEFT writes ``base_model.model.<module path>.hira_A`` and the like. This module only reads names;
whether the layer exists and the shape fits is decided by ``checkpoint``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from adapters.signature import Method

PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<method>hira|lora)_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?P<adapter>[^.]+))??(?P<weight>\.weight)?"
)
_BIAS = ".base_layer.bias"
_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<adapter>[^.]+))?(?=\.)")
# What torch.compile, FSDP and activation checkpointing put between the parts of a name.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."  # what DistributedDataParallel puts before a name


@dataclass(frozen=True, slots=True)
class FactorKey:
    """``side`` of the factors of the module at ``path``, as the file spells it."""

    path: str
    method: Method
    side: Literal["A", "B"]
    embedding: bool
    adapter: str | None = None  # its name in a file that was not saved by save_pretrained


@dataclass(frozen=True, slots=True)
class SavedKey:
    """A tensor of a module that was saved whole: a task head, normally."""

    path: str
    parameter: str
    adapter: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class BiasKey:
    """The bias of a target that was trained with its factors (LoRA's ``bias="lora_only"``)."""

    path: str


def parse_key(name: str) -> FactorKey | BiasKey | SavedKey | None:
    """What the tensor ``name`` is; None when it is nothing that an adapter has.

    Parts that a wrapper around the model left in the name are not looked at.

    Source: ``peft/utils/save_and_load.py``, ``get_peft_model_state_dict``.
    """
    name = unwrapped(name)
    if not name.startswith(PEFT_PREFIX):
        return None
    rest = name[len(PEFT_PREFIX) :]
    found = _FACTOR.fullmatch(rest)
    if found is not None:
        method: Method = "hira" if found["method"] == "hira" else "lora"
        # LoRA's factors are modules with a weight, except those of embeddings; HiRA's never are.
        if (found["weight"] is not None) != (method == "lora" and found["embedding"] is None):
            return None
        side: Literal["A", "B"] = "A" if found["side"] == "A" else "B"
        return FactorKey(
            found["path"], method, side, found["embedding"] is not None, found["adapter"]
        )
    if rest.endswith(_BIAS):
        return BiasKey(rest.removesuffix(_BIAS))
    saved = _SAVED.search(rest)
    path, dot, parameter = _SAVED.sub("", rest).rpartition(".")
    if not dot or any(
        part.startswith(("hira_", "lora_")) for part in (*path.split("."), parameter)
    ):
        return None
    return SavedKey(path, parameter, saved["adapter"] if saved else None)


def unwrapped(name: str) -> str:
    """``name`` without what wrappers around the trained model left in it."""
    bare = _WRAPPER.sub("", name)
    if bare.startswith(_PARALLEL + PEFT_PREFIX):
        bare = bare.removeprefix(_PARALLEL)
    return bare


def wrappers(name: str) -> tuple[str, ...]:
    """The parts of ``name`` that ``unwrapped`` leaves out."""
    found = [part[:-1] for part in _WRAPPER.findall(name)]
    if _WRAPPER.sub("", name) != unwrapped(name):
        found.append(_PARALLEL[:-1])
    return tuple(dict.fromkeys(found))
