"""A PEFT adapter folder as checked tensors, matched to the layers of one base model.

Everything that can be wrong with an adapter is found here, before any of it is stored or served:
its files, its options, its shapes, its numbers, its fit to the base. Several faults are reported
together. Nothing is written, and what a tensor proves goes before what the configuration claims.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
        layout, task, config = plan.layout, plan.task, plan.layout.config
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
    head = {key.name: tensors[entry.name] for key, entry in layout.saved}
    labels: Labels | None = None
    if BY_NAME[task].head == "adapter":
        labels, label_faults = plan.task_config.labels_for(head, task)
        faults += label_faults
    _raise_all(faults)
    generates = BY_NAME[task].lane == "generate"
    said = read_conversation(folder) if generates else Conversation()
    return AdapterWeights(
        config=config,
        factors={
            layer: Factors(
                config.method,
                tensors[pair["A"].name],
                tensors[pair["B"].name],
                config.scale(layout.spelled[layer], pair["A"].shape[0]),
                tensors[layout.biases[layer].name] if layer in layout.biases else None,
            )
            for layer, pair in layout.pairs.items()
        },
        head=head,
        labels=labels,
        task=task,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        nonzero=sum(nonzero.values()),
        notes=(*plan.notes, *said.notes, *_without_effect(nonzero)),
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


def _without_effect(nonzero: Mapping[str, int]) -> Iterator[str]:
    for side, count in nonzero.items():
        if not count:
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
