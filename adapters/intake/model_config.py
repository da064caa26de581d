"""The ``config.json`` beside an adapter: what its head's outputs mean, and how the head is built.

PEFT's own configuration has no place for labels; ``model.config.save_pretrained(folder)`` writes
them where this module looks. Without it the labels are LABEL_0, LABEL_1, ... as in transformers.
What it says of the body is the base's affair: where the two differ, a note names the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from adapters.errors import AdapterError, CorruptFile, MissingTensors, ShapeMismatch
from adapters.intake.strict_json import show, strict_json
from adapters.tasks import BY_NAME, Task

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
_PROBLEM_TYPES: tuple[ProblemType, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
_MAX_LABEL_CHARACTERS = 256
_MAX_VALUE_CHARACTERS = 100
# What a task class of transformers reads of its config to build its head and to run it.
HEAD_FIELDS: Final = frozenset(
    {
        "pad_token_id",
        "classifier_pooling",
        "classifier_activation",
        "classifier_bias",
        "pooler_hidden_act",
        "pooler_hidden_size",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
    }
)
# What changes no answer of an adapter; names with "dropout" in them and those with an underscore
# first do not either. The end tokens are the affair of ``adapters.intake.conversation``.
_FIELDS_WITHOUT_EFFECT: Final = frozenset(
    {
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tie_word_embeddings",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
# The last layer of a head, as transformers names it.
_OUTPUTS = ("score", "classifier", "out_proj", "qa_outputs", "summary")


@dataclass(frozen=True)
class Labels:
    """The names of a head's outputs, in order, and how they are read."""

    names: tuple[str, ...]
    problem_type: ProblemType | None


@dataclass(frozen=True)
class TaskConfig:
    """What the ``config.json`` beside an adapter says; all None where there is none.

    Args:
        head: The values of ``HEAD_FIELDS`` that it has.
        fields: All that it has.
    """

    model_type: str | None
    architecture: str | None
    names: tuple[str, ...] | None
    problem_type: ProblemType | None
    head: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def body_notes(self, base: Mapping[str, Any]) -> Iterator[str]:
        """What it says of the body in other words than the base's config, whose word counts.

        Args:
            base: The base's config; empty where it is not known.
        """
        rope = base.get("rope_parameters")
        known = {**base, "rope_theta": rope.get("rope_theta")} if isinstance(rope, dict) else base
        if isinstance(rope, dict):
            known = {**known, "rope_scaling": rope}  # one field of transformers 5, two before
        for name, value in self.fields.items():
            if (
                name.startswith("_")
                or "dropout" in name
                or name in HEAD_FIELDS | _FIELDS_WITHOUT_EFFECT
            ):
                continue
            if name in known and None not in (value, known[name]) and _differ(value, known[name]):
                yield (
                    f"config.json says {name[:80]} = {show(value)}, the base {show(known[name])}: "
                    "the base's is used"
                )

    def labels_for(
        self, head: Mapping[str, torch.Tensor], task: Task
    ) -> tuple[Labels | None, list[AdapterError]]:
        """The labels of a head, and what is wrong with them.

        Args:
            head: Its tensors by name.
            task: What the head is for.
        """
        outputs = output_counts({name: tuple(tensor.shape) for name, tensor in head.items()})
        if len(outputs) != 1:
            return None, [
                MissingTensors(
                    "The output layer of the task head was not found.",
                    found=", ".join(sorted(head)) or "no head",
                    expected="one of " + ", ".join(f"{name}.weight" for name in _OUTPUTS),
                    fix="Name the head in modules_to_save and save the adapter again.",
                )
            ]
        (count,) = outputs
        fixed = BY_NAME[task].output_names
        if fixed is not None:
            faults: list[AdapterError] = []
            if count != len(fixed):
                faults = [_wrong_label_count(count, len(fixed))]
            return Labels(fixed, None), faults
        names = self.names
        # Two labels are what transformers writes when nobody named any.
        if names is None or (names == _default_names(2) and count != 2):
            names = _default_names(count)
        faults = [] if len(names) == count else [_wrong_label_count(count, len(names))]
        return Labels(names, self.problem_type), faults


def output_counts(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """How many outputs each output layer has among the tensors of a head.

    Args:
        shapes: Of its tensors, by name.
    """
    return [
        shape[0]
        for name, shape in shapes.items()
        if name.endswith(".weight") and name.split(".")[-2] in _OUTPUTS and len(shape) == 2
    ]


def read_task_config(raw: bytes) -> TaskConfig:
    """Read the fields that matter of a model's ``config.json``; the others are not looked at.

    Raises:
        CorruptFile: It is not JSON, or one of these fields is malformed.
    """
    content = strict_json(raw, "config.json")
    architectures = content.get("architectures")
    problem_type = content.get("problem_type")
    head = {name: content[name] for name in sorted(HEAD_FIELDS & content.keys())}
    nested = content.get("text_config")
    if isinstance(nested, dict):
        # Of a model of texts and images, heads read the padding token of the part for texts.
        head.pop("pad_token_id", None)
        if "pad_token_id" in nested:
            head["pad_token_id"] = nested["pad_token_id"]
    for name, value in head.items():
        if name == "pad_token_id" and not (value is None or type(value) is int):
            raise _malformed_field(name, value, "a token id, or null")
        if not (value is None or isinstance(value, bool | int | float | str)) or (
            isinstance(value, str) and len(value) > _MAX_VALUE_CHARACTERS
        ):
            raise _malformed_field(name, value, "a short string, a number, true, false or null")
    if problem_type is not None and problem_type not in _PROBLEM_TYPES:
        raise _malformed_field("problem_type", problem_type, "one of " + ", ".join(_PROBLEM_TYPES))
    return TaskConfig(
        model_type=_text_field(content, "model_type"),
        architecture=architectures[0]
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
        else None,
        names=_label_names(content),
        problem_type=problem_type,
        head=head,
        fields=content,
    )


def _differ(value: Any, other: Any) -> bool:
    """Whether two values of a config say different things; of objects, where both say one."""
    if isinstance(value, dict) and isinstance(other, dict):
        return any(_differ(value[key], other[key]) for key in value.keys() & other.keys())
    return bool(value != other)


def _label_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    raw = content.get("id2label")
    if raw is None:
        count = content.get("num_labels")
        if count is None:
            return None
        if type(count) is not int or not 1 <= count <= 100_000:
            raise _malformed_field("num_labels", count, "a positive integer")
        return _default_names(count)
    if (
        not isinstance(raw, dict)
        or not raw
        or set(raw) != {str(index) for index in range(len(raw))}
    ):
        raise _malformed_field("id2label", raw, 'an object with the keys "0", "1", ...')
    names = tuple(raw[str(index)] for index in range(len(raw)))
    if not all(
        isinstance(name, str) and 0 < len(name) <= _MAX_LABEL_CHARACTERS and name.isprintable()
        for name in names
    ):
        raise _malformed_field("id2label", raw, "short printable strings")
    if len(set(names)) != len(names):
        raise _malformed_field("id2label", raw, "another name for each label")
    return names


def _default_names(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))


def _text_field(content: Mapping[str, Any], name: str) -> str | None:
    value = content.get(name)
    if value is not None and not isinstance(value, str):
        raise _malformed_field(name, value, "a string")
    return value or None


def _wrong_label_count(count: int, expected: int) -> ShapeMismatch:
    return ShapeMismatch(
        "The head has another number of outputs than there are labels.",
        found=f"{count} outputs",
        expected=f"{expected} labels",
        fix="Save the config of the model that the adapter was trained with beside it.",
    )


def _malformed_field(name: str, value: object, expected: str) -> CorruptFile:
    return CorruptFile(f"config.json: {name} is malformed.", found=show(value), expected=expected)
