"""How a folder says that one vector is made of a text: sentence-transformers' ``modules.json``.

Beside it lie the pooling's own ``config.json``, in a folder of its own, and what is said of prompts
and lengths. A stored adapter is flat: ``1_Pooling/config.json`` is kept as ``1_Pooling.json``.
What cannot be done as declared is refused by name; what is left to the client is noted by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from adapters.errors import AdapterError, CorruptFile, UnsupportedOption
from adapters.intake.safetensors_header import open_regular
from adapters.intake.strict_json import MAX_JSON_BYTES, show, strict_json, strict_list

MODULES_FILE: Final = "modules.json"
PROMPTS_FILE: Final = "config_sentence_transformers.json"
LENGTH_FILE: Final = "sentence_bert_config.json"
# By their path in a folder: the names under which the same files lie flat.
NESTED: Final[Mapping[str, str]] = {
    f"{n}_Pooling/config.json": f"{n}_Pooling.json" for n in (1, 2, 3)
}
# What decides a vector, and with it an adapter's version.
POOLING_FILES: Final = (MODULES_FILE, *NESTED.values())
EMBEDDING_FILES: Final = (*POOLING_FILES, PROMPTS_FILE, LENGTH_FILE)

Mode = Literal["mean", "cls", "last"]
_MODES: Final[Mapping[str, Mode]] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_LIBRARY = "sentence_transformers."
_MODULES_MAX = 64
_PROMPTS_SHOWN = 8


@dataclass(frozen=True)
class Declaration:
    """What a folder says of its vectors.

    Args:
        mode: What is read of the tokens' states; None where nothing is said.
        normalize: Whether vectors are scaled to length 1; of no meaning without a mode.
        notes: What is said there and not used, for a person to read.
    """

    mode: Mode | None = None
    normalize: bool = True
    notes: tuple[str, ...] = ()


def located(folder: Path) -> dict[str, Path]:
    """Where ``EMBEDDING_FILES`` are in a folder, flat or nested, by their flat name."""
    names = {name: name for name in EMBEDDING_FILES} | {flat: name for name, flat in NESTED.items()}
    places = {flat: (folder / name, folder / flat) for flat, name in names.items()}
    return {
        flat: there[0]
        for flat, paths in places.items()
        if (there := [path for path in paths if os.path.lexists(path)])
    }


def pooling_files(folder: Path) -> dict[str, bytes]:
    """The bytes of the files that ``located`` finds, by their flat name.

    Raises:
        CorruptFile: One of them is not a regular file.
    """
    found: dict[str, bytes] = {}
    for flat, path in located(folder).items():
        with open_regular(path) as file:
            found[flat] = file.read(MAX_JSON_BYTES + 1)
    return found


def read_pooling(files: Mapping[str, bytes], max_length: int) -> Declaration:
    """Read and check a declaration.

    Args:
        files: As ``pooling_files`` gives them.
        max_length: Tokens that one input may have here.

    Raises:
        CorruptFile: Malformed, or a file that ``modules.json`` names is missing.
        UnsupportedOption: A module, a mode or a default prompt that is not honoured.
    """
    if MODULES_FILE not in files:
        named = {flat: name for name, flat in NESTED.items()}
        unused = [named[flat] for flat in named if flat in files]
        return Declaration(
            notes=tuple(f"{name} without {MODULES_FILE} is not used" for name in unused)
        )
    mode: Mode | None = None
    normalize = False
    notes: list[str] = []
    for index, module in enumerate(_modules(files[MODULES_FILE])):
        kind, path = module
        if kind == "Dropout" or (kind == "Transformer" and index == 0):
            continue
        if kind == "Pooling" and mode is None:
            mode, more = _pooling(files, path)
            notes += more
        elif kind == "Normalize" and mode is not None:
            normalize = True
        else:
            raise UnsupportedOption(
                f"The module {kind[:80]} of {MODULES_FILE} is not supported there.",
                found=f"{kind[:80]} as module {index}",
                expected="a Transformer, one Pooling, then at most a Normalize",
                fix="Serve the model without it, and apply it to the vectors yourself.",
            )
    notes += _prompts(files.get(PROMPTS_FILE, b"{}"))
    notes += _lengths(files.get(LENGTH_FILE, b"{}"), max_length)
    return Declaration(mode, normalize, tuple(notes))


def base_pooling(folder: Path, max_length: int) -> Declaration | UnsupportedOption:
    """What the folder of a base declares, or why its vectors are not to be had.

    A base whose pooling is not supported still classifies and generates; an adapter with a
    declaration of its own, or a request that names a pooling, is not kept from its vectors either.
    """
    try:
        return read_pooling(pooling_files(folder), max_length)
    except AdapterError as fault:
        return UnsupportedOption(
            f"The base declares vectors that are not served: {fault.message}",
            found=fault.found,
            expected=fault.expected,
            fix="Name a pooling in the request (mean, cls or last) for vectors without it.",
        )


def _modules(raw: bytes) -> Iterator[tuple[str, str]]:
    """The kind and the path of each module."""
    content = strict_list(raw, MODULES_FILE)
    if len(content) > _MODULES_MAX:
        raise _malformed_declaration(
            MODULES_FILE, f"{len(content)} modules", f"at most {_MODULES_MAX}"
        )
    for entry in content:
        kind = entry.get("type") if isinstance(entry, dict) else None
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(path, str):
            raise _malformed_declaration(
                MODULES_FILE, show(entry), "an object with type and path, both texts"
            )
        # Code that a folder brings along is never run, whatever its class is called.
        yield kind.rsplit(".", 1)[-1] if kind.startswith(_LIBRARY) else kind, path


def _pooling(files: Mapping[str, bytes], path: str) -> tuple[Mode, list[str]]:
    name = f"{path}/config.json"
    if name not in NESTED:
        raise UnsupportedOption(
            f"{MODULES_FILE} has its pooling in a folder that is not looked into.",
            found=show(path),
            expected=" or ".join(one.partition("/")[0] for one in NESTED),
            fix="Save the model again with sentence-transformers.",
        )
    if NESTED[name] not in files:
        raise CorruptFile(
            f"{MODULES_FILE} names a pooling whose configuration is missing.",
            found=f"no {name}",
            expected=f"{name} beside {MODULES_FILE}",
            fix=f"Send it along: an upload takes it under the file name {name}.",
        )
    content = strict_json(files[NESTED[name]], name)
    modes = _modes(content, name)
    if len(modes) != 1:
        raise UnsupportedOption(
            "Several poolings side by side are not supported.",
            found=", ".join(show(mode) for mode in modes[:8]),
            expected="one of " + ", ".join(_MODES),
        )
    if modes[0] not in _MODES:
        raise UnsupportedOption(
            f"The pooling {modes[0][:80]} is not supported.",
            found=f"{show(modes[0])} in {name}",
            expected="one of " + ", ".join(_MODES),
            fix="Train with one of these, or pool the vectors of tokens elsewhere.",
        )
    skips = content.get("include_prompt", True) is False
    notes = [f"{name}: include_prompt = false is not used, a prompt is pooled too"] if skips else []
    return _MODES[modes[0]], notes


def _modes(content: Mapping[str, Any], name: str) -> list[str]:
    """The modes that a pooling names: ``pooling_mode`` where it is there, else the flags."""
    if "pooling_mode" in content:
        value = content["pooling_mode"]
        modes = [value] if isinstance(value, str) else value
        if not (isinstance(modes, list) and modes and all(isinstance(one, str) for one in modes)):
            raise _malformed_declaration(
                name, f"pooling_mode = {show(value)}", "a text or a list of texts"
            )
        return list(modes)
    chosen: list[str] = []
    for flag, value in content.items():
        if not flag.startswith("pooling_mode"):
            continue
        if not isinstance(value, bool):
            raise _malformed_declaration(name, f"{flag[:80]} = {show(value)}", "true or false")
        if value:
            chosen.append(_FLAGS.get(flag, flag))
    return chosen or ["mean"]  # what sentence-transformers takes where nothing is chosen


def _prompts(raw: bytes) -> Iterator[str]:
    content = strict_json(raw, PROMPTS_FILE)
    prompts = content.get("prompts") or {}
    default = content.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise _malformed_declaration(
            PROMPTS_FILE, f"prompts = {show(prompts)}", "an object of texts"
        )
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise _malformed_declaration(
            PROMPTS_FILE, f"default_prompt_name = {show(default)}", "a name of its prompts, or null"
        )
    if default is not None and prompts[default]:
        raise UnsupportedOption(
            "A prompt that is put before every text is not supported.",
            found=f"default_prompt_name = {show(default)}, {show(prompts[default])}",
            expected="default_prompt_name = null",
            fix="Set it to null and put the prompt before the texts that are sent.",
        )
    named = [str(name)[:80] for name, prompt in prompts.items() if prompt]
    if named:
        more = f" and {len(named) - _PROMPTS_SHOWN} more" if len(named) > _PROMPTS_SHOWN else ""
        yield (
            f"{PROMPTS_FILE} has prompts ({', '.join(named[:_PROMPTS_SHOWN])}{more}): none is "
            "added to a text, send them with it"
        )
    if content.get("truncate_dim") is not None:
        yield f"{PROMPTS_FILE}: truncate_dim is not used, vectors are whole"


def _lengths(raw: bytes, max_length: int) -> Iterator[str]:
    content = strict_json(raw, LENGTH_FILE)
    most = content.get("max_seq_length")
    if most is not None and most != max_length:
        yield f"{LENGTH_FILE}: max_seq_length = {show(most)} is not used, {max_length} tokens are"
    if content.get("do_lower_case"):
        yield f"{LENGTH_FILE}: do_lower_case is not used, the base's tokenizer decides"


def _malformed_declaration(name: str, found: str, expected: str) -> CorruptFile:
    return CorruptFile(f"{name} is malformed.", found=found, expected=expected)
