"""The base's own weights on disk, for one question: is a copy that came with an adapter the same?

PEFT saves the base's weight beside factors of an embedding or a language-model head. Only files are
compared, so no weight has to be in memory, and however the base is stored while it is served (4 or
8 bits, another dtype) does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from adapters.intake.safetensors_header import CHUNK_ELEMENTS, TensorEntry, read_tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BaseFiles:
    """The safetensors of one base.

    Args:
        folder: With ``model.safetensors``, or shards and their index.
        prefix: Where the backbone is in the model; a file of the bare backbone lacks it.
        tied: A parameter's path → the others that are the same tensor; files hold one of them.
    """

    folder: Path
    prefix: str
    tied: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, folder: Path, model: nn.Module, prefix: str) -> BaseFiles:
        """The files of ``model``, which may be on the meta device."""
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        tied = {name: tuple(names) for names in groups.values() for name in names[1:]}
        tied |= {names[0]: tuple(names) for names in groups.values() if len(names) > 1}
        return cls(folder, prefix, tied)

    def difference(self, path: str, file: BinaryIO, copy: TensorEntry) -> Difference | None:
        """How a tensor of an adapter file differs from the base's own; None if in no bit.

        The base's tensor is taken in the copy's dtype: what a model loaded in that dtype had.
        Memory stays within a few ``CHUNK_ELEMENTS``.

        Args:
            path: The parameter's path in the base model.
            file: The adapter's tensors, open for reading; its position moves.
            copy: An entry of that file's header.
        """
        try:
            return self._difference(path, file, copy)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            return Difference(f"the base's files cannot be read: {type(error).__name__}")

    def _difference(self, path: str, file: BinaryIO, copy: TensorEntry) -> Difference | None:
        holder = self._find(path)
        if holder is None:
            return Difference("the base's files hold no such tensor")
        shard, name = holder
        with safe_open(str(shard), framework="pt") as opened:
            own = opened.get_slice(name)
            shape = tuple(own.get_shape())
            if shape != copy.shape:
                return Difference(f"shape {copy.shape}", f"shape {shape}", comparable=True)
            differing = 0
            for rows, piece in _row_runs(copy):
                base = own[rows] if shape else opened.get_tensor(name)
                if base.dtype not in _FLOATS:
                    return Difference(f"the base is stored as {base.dtype}".replace("torch.", ""))
                wanted = base.to(copy.dtype).contiguous().reshape(-1)
                given = read_tensor(file, piece).reshape(-1)
                unequal = wanted.view(torch.uint8) != given.view(torch.uint8)
                differing += int(unequal.reshape(-1, copy.dtype.itemsize).any(1).sum())
        if not differing:
            return None
        return Difference(f"{differing} of {copy.elements} values differ", comparable=True)

    def _find(self, path: str) -> tuple[Path, str] | None:
        """The file with the tensor at ``path`` and its name there."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            shards: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        else:
            with safe_open(str(self.folder / SINGLE_FILE), framework="pt") as opened:
                shards = dict.fromkeys(opened.keys(), SINGLE_FILE)
        for parameter in (path, *self.tied.get(path, ())):
            for name in (parameter, parameter.removeprefix(f"{self.prefix}.")):
                if name in shards:
                    return self.folder / shards[name], name
        return None


@dataclass(frozen=True, slots=True)
class Difference:
    """What was found and expected; ``comparable``: both are known, and are not the same."""

    found: str
    expected: str = "the base's own weight, bit for bit"
    comparable: bool = False


def _row_runs(entry: TensorEntry) -> Iterator[tuple[slice, TensorEntry]]:
    """A tensor as runs of whole rows of about ``CHUNK_ELEMENTS`` numbers."""
    if not entry.shape:
        yield slice(0), entry
        return
    row = math.prod(entry.shape[1:])
    count = max(1, CHUNK_ELEMENTS // max(1, row))
    for first in range(0, entry.shape[0], count):
        last = min(first + count, entry.shape[0])
        start = entry.start + first * row * entry.dtype.itemsize
        stop = entry.start + last * row * entry.dtype.itemsize
        shape = (last - first, *entry.shape[1:])
        yield slice(first, last), TensorEntry(entry.name, entry.dtype, shape, start, stop)
