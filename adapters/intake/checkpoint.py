"""A PEFT adapter folder as checked tensors, matched to the layers of one base model.

Everything that can be wrong with an adapter is found here, before any of it is stored or served:
its files, its options, its shapes, its numbers, its fit to the base. Several faults are reported
together. Nothing is written, and what a tensor proves goes before what the configuration claims.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    BaseMismatch,
    UnsupportedOption,
)
from adapters.factors import Factors
from adapters.intake.base_files import Difference
from adapters.intake.config import AdapterConfig, parse_config
from adapters.intake.conversation import Conversation, read_conversation
from adapters.intake.file_names import CARD_FILE
from adapters.intake.keys import FactorKey, parse_key
from adapters.intake.layout import Layout
from adapters.intake.model_config import Labels, TaskConfig, output_counts, read_task_config
from adapters.intake.pooling import EMBEDDING_FILES, Declaration, pooling_files, read_pooling
from adapters.intake.recent_results import RecentResults
from adapters.intake.safetensors_header import (
    TENSOR_FILE,
    TensorEntry,
    inspect_values,
    open_regular,
    open_tensors,
    read_header,
    read_tensor,
)
from adapters.intake.strict_json import MAX_JSON_BYTES
from adapters.intake.task_of import said_task, task_of
from adapters.signature import BaseSignature
from adapters.tasks import BY_NAME, Task

CONFIG_FILE = "adapter_config.json"
TASK_CONFIG_FILE = "config.json"
STORED_FILES = (CONFIG_FILE, TENSOR_FILE, TASK_CONFIG_FILE, CARD_FILE, *EMBEDDING_FILES)
_RECENT_PLANS = 32


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter, checked against one base.

    Args:
        config: Its configuration.
        factors: By the layer's path in the base.
        head: Tensors of modules saved whole, by their path in the task's model.
        labels: What the head's outputs mean; None without such a head.
        task: What the adapter is for.
        tensor_bytes: Of all its tensors, as stored.
        parameters: Numbers in all its tensors.
        nonzero: Of the parameters of its factors.
        zero_sides: ``A`` or ``B``, where every number of that side is zero.
        notes: Contradictions, and what of it is not used, for a person to read.
        head_config: What its own ``config.json`` says of how the head is built and read.
        pooling: What it declares of how a vector is made.
        conversation: Templates, end tokens and defaults of one that generates.
    """

    config: AdapterConfig
    factors: Mapping[str, Factors]
    head: Mapping[str, torch.Tensor]
    labels: Labels | None
    task: Task
    tensor_bytes: int = 0
    parameters: int = 0
    nonzero: int = 0
    zero_sides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    head_config: Mapping[str, Any] = field(default_factory=dict)
    pooling: Declaration = field(default_factory=Declaration)
    conversation: Conversation = field(default_factory=Conversation)

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank among the layers."""
        ranks = [entry.rank for entry in self.factors.values()]
        return min(ranks), max(ranks)

    @property
    def sparsity(self) -> float:
        """The share of zeros among the numbers of the factors, 0 to 1."""
        count = sum(entry.a.numel() + entry.b.numel() for entry in self.factors.values())
        return 1.0 - self.nonzero / count if count else 0.0


@dataclass(frozen=True, slots=True)
class Numbers:
    """All numbers of an adapter, without what its configuration says of them.

    Args:
        factors: By the layer's path in the base: A, B, and the bias that replaces the layer's.
        head: By the tensor's path in the task's model.
        nonzero: Of the factors, in the dtype they were stored in.
        zero_sides: ``A`` or ``B``, where every number of that side is zero.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    head: Mapping[str, torch.Tensor]
    nonzero: int
    zero_sides: tuple[str, ...] = ()


def load_adapter(folder: Path, base: BaseSignature) -> AdapterWeights:
    """Read and check the adapter in ``folder``; mutates nothing.

    Args:
        folder: As PEFT's ``save_pretrained`` leaves it; a ``config.json`` beside the adapter, as
            ``model.config.save_pretrained`` writes it, names the labels; a ``modules.json``, as
            sentence-transformers writes it, says how a vector is made.
        base: The signature of the base model to serve it on.

    Returns:
        Tensors in memory of their own, in the dtype they were stored in.

    Raises:
        UnsafeFormat: There is a pickle in place of safetensors.
        CorruptFile: A file is missing or malformed.
        UnsupportedMethod, UnsupportedOption: Not served; the message names what.
        BaseMismatch: It was made for another base.
        UnmatchedTensors, MissingTensors, ShapeMismatch, NonFinite: As their names say.
        AdapterFaults: Several of these.
    """
    with _open_folder(folder, base) as (file, entries, plan):
        numbers, faults = _read_numbers(file, entries, plan.layout, base)
    return _weights(folder, entries, plan, numbers, faults)


def load_with(folder: Path, base: BaseSignature, numbers: Numbers) -> AdapterWeights:
    """The adapter in ``folder`` as ``load_adapter`` reads it, with numbers that were read and
    checked before: all files but the tensors are read and checked again.

    Args:
        folder, base: As for ``load_adapter``.
        numbers: Of this very adapter, in any dtype and of any strides.

    Raises:
        ValueError: They are not of the shapes that the adapter has.
        AdapterError: As for ``load_adapter``.
    """
    with _open_folder(folder, base) as (file, entries, plan):
        layout = plan.layout
        faults = [
            fault
            for parameter, entry in layout.copies
            for fault in _copy_faults(file, parameter, entry, base)
        ]
    expected: dict[str, Any] = {
        layer: (pair["A"].shape, pair["B"].shape, _shape_of(layout.biases.get(layer)))
        for layer, pair in layout.pairs.items()
    }
    found: dict[str, Any] = {
        layer: tuple(map(_shape_of, tensors)) for layer, tensors in numbers.factors.items()
    }
    heads = {key.name: (entry.dtype, entry.shape) for key, entry in layout.saved}
    found_heads = {name: (one.dtype, tuple(one.shape)) for name, one in numbers.head.items()}
    if expected != found or heads != found_heads:
        raise ValueError("these are the numbers of another adapter")
    return _weights(folder, entries, plan, numbers, faults)


def _shape_of(tensor: torch.Tensor | TensorEntry | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


@contextmanager
def _open_folder(
    folder: Path, base: BaseSignature
) -> Iterator[tuple[BinaryIO, Mapping[str, TensorEntry], _CheckedFolder]]:
    """The open tensors of an adapter, their header, and all that can be said before any number."""
    config_json = _read_small(folder, CONFIG_FILE)
    task_json = _read_small(folder, TASK_CONFIG_FILE, optional=True)
    pooling = pooling_files(folder)
    if not (folder / TENSOR_FILE).exists():
        parse_config(config_json)  # another program's folder is named as that
    with open_tensors(folder) as file:
        entries = read_header(file)
        # The base is in the key by identity, and in the plan, so that no other can take its place.
        plan = _recent_plans.get(
            (id(base), config_json, task_json, *pooling.items(), tuple(entries.values())),
            lambda: _plan(config_json, task_json, pooling, entries, base),
        )
        yield file, entries, plan


def _read_numbers(
    file: BinaryIO, entries: Mapping[str, TensorEntry], layout: Layout, base: BaseSignature
) -> tuple[Numbers, list[AdapterError]]:
    """Every number that is used of a file, and what is wrong with the numbers."""
    faults: list[AdapterError] = []
    tensors: dict[str, torch.Tensor] = {}
    nonzero = {"A": 0, "B": 0}
    copies = {entry.name for _, entry in layout.copies}
    for parameter, entry in layout.copies:
        faults += _copy_faults(file, parameter, entry, base)
    for entry in entries.values():
        if entry.name in copies:
            continue  # the base's own is used
        tensor = read_tensor(file, entry)
        values = inspect_values(tensor, entry.name)
        if values.fault is not None:
            faults.append(values.fault)
        key = parse_key(entry.name)
        if isinstance(key, FactorKey):
            nonzero[key.side] += values.nonzero
        tensors[entry.name] = tensor
    factors = {
        layer: (
            tensors[pair["A"].name],
            tensors[pair["B"].name],
            tensors[layout.biases[layer].name] if layer in layout.biases else None,
        )
        for layer, pair in layout.pairs.items()
    }
    head = {key.name: tensors[entry.name] for key, entry in layout.saved}
    zero_sides = tuple(side for side, count in nonzero.items() if not count)
    return Numbers(factors, head, sum(nonzero.values()), zero_sides), faults


def _weights(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    plan: _CheckedFolder,
    numbers: Numbers,
    faults: list[AdapterError],
) -> AdapterWeights:
    """A checked folder and its numbers as one adapter; raises ``faults``, and those of its head."""
    layout, task, config = plan.layout, plan.task, plan.layout.config
    labels: Labels | None = None
    if BY_NAME[task].head == "adapter":
        labels, label_faults = plan.task_config.labels_for(numbers.head, task)
        faults = [*faults, *label_faults]
    _raise_all(faults)
    generates = BY_NAME[task].lane == "generate"
    said = read_conversation(folder) if generates else Conversation()
    copies = {entry.name for _, entry in layout.copies}
    used = [entry for entry in entries.values() if entry.name not in copies]
    return AdapterWeights(
        config=config,
        factors={
            layer: Factors(
                config.method, a, b, config.scale(layout.spelled[layer], a.shape[0]), bias
            )
            for layer, (a, b, bias) in numbers.factors.items()
        },
        head=numbers.head,
        labels=labels,
        task=task,
        tensor_bytes=sum(entry.stop - entry.start for entry in used),
        parameters=sum(entry.elements for entry in used),
        nonzero=numbers.nonzero,
        zero_sides=numbers.zero_sides,
        notes=(*plan.notes, *said.notes, *_without_effect(numbers.zero_sides)),
        head_config=plan.task_config.head,
        pooling=plan.pooling,
        conversation=said,
    )


def _copy_faults(
    file: BinaryIO, parameter: str, entry: TensorEntry, base: BaseSignature
) -> list[AdapterError]:
    """What is wrong with a tensor that should be the base's own ``parameter``, to the bit."""
    if base.files is None:
        difference = Difference("the base's files are not at hand here")
    else:
        found = base.files.difference(parameter, file, entry)
        if found is None:
            return []
        difference = found
    beside_factors = ".base_layer." in entry.name
    if not difference.comparable and beside_factors:
        fix = "Save it with save_pretrained(..., save_embedding_layers=False)."
    elif difference.expected.startswith("shape"):
        fix = "Serve the base as it was resized for the training: save it with save_pretrained."
    elif beside_factors:
        fix = "Register it on a server of the very base that it was trained on."
    else:
        fix = "Target the module with HiRA or LoRA in place of modules_to_save."
    return [
        UnsupportedOption(
            "The adapter brings a weight of the base itself, and another one than this base's."
            if beside_factors
            else "A module of the base itself was trained and saved whole.",
            found=f"{parameter}: {difference.found}",
            expected=difference.expected,
            fix=fix,
        )
    ]


def _without_effect(sides: tuple[str, ...]) -> Iterator[str]:
    for side in sides:
        yield f"every {side} is zero: the layers answer as the base's own, as before training"


def _plan(
    config_json: bytes,
    task_json: bytes,
    pooling_json: Mapping[str, bytes],
    entries: Mapping[str, TensorEntry],
    base: BaseSignature,
) -> _CheckedFolder:
    """Everything about an adapter but its numbers; raises whatever is wrong with that."""
    config = parse_config(config_json)
    task_config = read_task_config(task_json)
    if task_config.model_type not in (None, base.model_type):
        raise BaseMismatch(
            "The adapter was made for another architecture.",
            found=f"model_type {task_config.model_type} in {TASK_CONFIG_FILE}",
            expected=base.model_type,
            fix="Register it on a server of its own base.",
        )
    pooling = read_pooling(pooling_json, base.max_length)
    said = said_task(config, task_config)
    layout = Layout(config, base, said is not None and BY_NAME[said].head == "adapter")
    for entry in entries.values():
        layout.take(entry)
    shapes = {key.name: tuple(entry.shape) for key, entry in layout.saved}
    counts = output_counts(shapes)
    task = task_of(
        config,
        base,
        task_config,
        has_head=bool(layout.saved),
        outputs=counts[0] if len(counts) == 1 else None,
    )
    _raise_all(layout.faults(task))
    notes = (*layout.notes(), *task_config.body_notes(base.config), *pooling.notes)
    return _CheckedFolder(task_config, layout, task, pooling, notes)


@dataclass(frozen=True, slots=True)
class _CheckedFolder:
    """What a configuration and a header say together, checked; adapters of one recipe share it."""

    task_config: TaskConfig
    layout: Layout
    task: Task
    pooling: Declaration
    notes: tuple[str, ...]


def _raise_all(faults: list[AdapterError]) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise AdapterFaults(faults)


_recent_plans: RecentResults[_CheckedFolder] = RecentResults(_RECENT_PLANS)


def _read_small(folder: Path, name: str, *, optional: bool = False) -> bytes:
    if optional and not os.path.lexists(folder / name):
        return b"{}"
    with open_regular(folder / name) as file:
        return file.read(MAX_JSON_BYTES + 1)
