"""HiRA checkpoints of its authors' own code, made into what PEFT saves.

Their code is a fork of an early PEFT: a pickle, ``peft_type`` LORA, ``r_ab`` for the rank, tensors
``lora_A`` and ``lora_B`` without ``.weight``, an alpha and a ``scale_ab`` that no forward reads:

    W' = W0 ⊙ (1 + B A)

The pickle is read by torch's restricted unpickler, which makes tensors and runs no code.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from adapters.errors import (
    CorruptFile,
    MissingTensors,
    ShapeMismatch,
    UnmatchedTensors,
    UnsafeFormat,
    UnsupportedMethod,
    UnsupportedOption,
    UploadTooLarge,
)
from adapters.intake.checkpoint import CONFIG_FILE, TASK_CONFIG_FILE
from adapters.intake.config import parse_config
from adapters.intake.factor_shapes import first_names
from adapters.intake.foreign import AUTHORS_MARK, authors_variant
from adapters.intake.keys import PEFT_PREFIX, FactorKey, SavedKey, parse_key
from adapters.intake.safetensors_header import (
    MAX_TENSOR_FILE_BYTES,
    SAFETENSORS_DTYPES,
    TENSOR_FILE,
    open_regular,
    read_header,
)
from adapters.intake.strict_json import MAX_JSON_BYTES, show, strict_json

PICKLE_FILE: Final = "adapter_model.bin"
_PEFT_VERSION: Final = "0.21.2"  # whose layout is written


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: layers with factors, their ranks, modules of a head."""

    layers: int
    ranks: tuple[int, ...]
    head: tuple[str, ...]


def convert(source: Path, dest: Path) -> Converted:
    """Write the authors' checkpoint in ``source`` as an adapter of PEFT; no number changes.

    Args:
        source: A folder with ``adapter_config.json`` and ``adapter_model.bin`` or
            ``adapter_model.safetensors``; read only.
        dest: A folder that is made; it appears whole or not at all.

    Raises:
        UnsupportedMethod: No such checkpoint, or the ``rand_R`` variant, which is no HiRA.
        UnsupportedOption: Trained biases, which PEFT's HiRA does not have.
        UnsafeFormat: The pickle holds more than tensors.
        CorruptFile, MissingTensors, UnmatchedTensors, ShapeMismatch: As their names say.
        UploadTooLarge: More bytes than an adapter may have.
        FileExistsError: ``dest`` is there already.
    """
    if os.path.lexists(dest):
        raise FileExistsError(f"{dest} exists already")
    with open_regular(source / CONFIG_FILE) as file:
        content = strict_json(file.read(MAX_JSON_BYTES + 1), CONFIG_FILE)
    _check_config(content)
    tensors = _renamed(_read_checkpoint(source))
    ranks = _ranks(tensors)
    config = json.dumps(_converted_config(content, ranks), indent=2)
    parse_config(config.encode())
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".converted-") as scratch:
        folder = Path(scratch) / "adapter"
        folder.mkdir()
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        if (source / TASK_CONFIG_FILE).is_file():
            shutil.copyfile(source / TASK_CONFIG_FILE, folder / TASK_CONFIG_FILE)
        folder.rename(dest)
    keys = [key for name in tensors if isinstance(key := parse_key(name), SavedKey)]
    head = tuple(sorted({key.path for key in keys}))
    return Converted(len(ranks), tuple(sorted(set(ranks.values()))), head)


def _check_config(content: Mapping[str, Any]) -> None:
    if AUTHORS_MARK not in content:
        raise UnsupportedMethod(
            "This is no checkpoint of the HiRA authors' own code.",
            found=f"peft_type {show(content.get('peft_type'))} without {AUTHORS_MARK}",
            expected=f"an adapter_config.json with {AUTHORS_MARK}",
            fix="Register it as it is: hira adapters add NAME PATH.",
        )
    variant = authors_variant(content)
    if variant is not None:
        raise variant
    if content.get("bias") not in (None, "none"):
        raise UnsupportedOption(
            "Trained biases are no part of HiRA as PEFT has it.",
            found=f"bias = {show(content['bias'])}",
            expected='bias = "none"',
            fix='Train with bias="none".',
        )


def _read_checkpoint(source: Path) -> dict[str, torch.Tensor]:
    if (source / TENSOR_FILE).exists():
        with open_regular(source / TENSOR_FILE) as file:
            read_header(file)
        stored: dict[str, torch.Tensor] = load_file(source / TENSOR_FILE)
        return stored
    with open_regular(source / PICKLE_FILE) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TENSOR_FILE_BYTES:
            raise UploadTooLarge(
                "The checkpoint is too large.",
                found=f"{size} bytes",
                expected=f"at most {MAX_TENSOR_FILE_BYTES}",
            )
        try:
            read = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as cause:
            raise UnsafeFormat(
                "The pickle holds more than tensors, so it is not read.",
                found=str(cause).splitlines()[0][:200],
                expected="a dictionary of tensors",
                fix="Save the state dict of the adapter alone.",
            ) from cause
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as cause:
            raise _corrupt_checkpoint(f"{type(cause).__name__}: {str(cause)[:160]}") from cause
    if not isinstance(read, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype in SAFETENSORS_DTYPES.values()
        for name, tensor in read.items()
    ):
        raise _corrupt_checkpoint(f"a {type(read).__name__}")
    tensors: dict[str, torch.Tensor] = read
    return tensors


def _corrupt_checkpoint(found: str) -> CorruptFile:
    return CorruptFile(
        f"{PICKLE_FILE} cannot be read.", found=found, expected="a dictionary of float tensors"
    )


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names that PEFT's HiRA gives them, each in memory of its own."""
    made: dict[str, torch.Tensor] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        if ".lora_R" in name:
            found = authors_variant({"rand_R": True})
            assert found is not None
            raise found
        key = parse_key(name.replace(".lora_A", ".hira_A").replace(".lora_B", ".hira_B"))
        if isinstance(key, FactorKey) and not key.embedding:
            target = f"{PEFT_PREFIX}{key.path}.hira_{key.side}"
        elif isinstance(key, SavedKey):
            target = PEFT_PREFIX + key.name
        else:
            strange.append(name)
            continue
        if target in made:
            raise CorruptFile(f"Two tensors claim to be {target}.", found=name, expected="one")
        made[target] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if strange:
        raise UnmatchedTensors(
            "Some tensors are none that the authors' code saves.",
            found=f"{len(strange)}: {first_names(strange)}",
            expected=f"{PEFT_PREFIX}....lora_A and lora_B, and modules saved whole",
        )
    return made


def _ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The rank by layer."""
    ranks: dict[str, int] = {}
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key = parse_key(name)
        if isinstance(key, FactorKey):
            sides.setdefault(key.path, {})[key.side] = tensor
    for path, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise MissingTensors(
                f"{path} has one factor of two.", found=f"only {', '.join(pair)}", expected="A, B"
            )
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] >= 1:
            raise ShapeMismatch(
                f"The factors of {path} have no product.",
                found=f"A {tuple(a.shape)}, B {tuple(b.shape)}",
                expected="A [r, in], B [out, r]",
            )
        ranks[path] = a.shape[0]
    if not ranks:
        raise MissingTensors(
            "The checkpoint has no factors.", found="0 layers", expected="at least one"
        )
    return ranks


def _converted_config(content: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's configuration; what the authors' forward never reads is left out."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    named = content.get("target_modules")
    # Their code takes ``proj`` for every module whose name ends so, PEFT for those called so.
    names = named if isinstance(named, list) else []
    fits = all(any(path == name or path.endswith(f".{name}") for name in names) for path in ranks)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": content.get("base_model_name_or_path"),
        "exclude_modules": None,
        "fan_in_fan_out": bool(content.get("fan_in_fan_out")),
        "hira_dropout": content.get("lora_dropout") or 0.0,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": content.get("modules_to_save"),
        "peft_type": "HIRA",
        "peft_version": _PEFT_VERSION,
        "r": rank,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "revision": content.get("revision"),
        "target_modules": names if fits else sorted(ranks),
        "task_type": content.get("task_type"),
    }
