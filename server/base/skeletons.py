"""Task classes of transformers without weights and without a backbone: what a head must look like.

Built on the meta device from the base's config alone, so the HTTP side can check an adapter's head
before it is registered, and the worker can fill it with tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    MissingTensors,
    ShapeMismatch,
    UnmatchedTensors,
    UnsupportedOption,
)
from adapters.intake.recent_results import RecentResults
from adapters.intake.strict_json import show
from adapters.layers.adapted import AdaptedLinear
from adapters.tasks import BY_NAME, Task

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights


_MADE_KEPT = 64


class Skeletons:
    """The task classes for one base, made when first needed.

    Args:
        config: The base's config.
        vocab_size: Of the base.
        has_pooler: Whether the base's checkpoint holds a pooler.
        beside: Tensors of the base beside its backbone, name → shape. transformers fills those of a
            task class that have the same name, as ModernBERT's ``head``, from the base.
    """

    def __init__(
        self,
        config: Any,
        vocab_size: int,
        *,
        has_pooler: bool,
        beside: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._has_pooler = has_pooler
        self._beside = beside or {}
        self._made: RecentResults[Any] = RecentResults(_MADE_KEPT)

    def check(self, weights: AdapterWeights) -> None:
        """Check that the head of an adapter is all that its task needs; mutates nothing.

        Raises:
            MissingTensors: Not all tensors of its head, or a pooler that the base does not have.
            UnmatchedTensors: Tensors that are no part of such a head.
            ShapeMismatch: A tensor of another shape.
            UnsupportedOption: The family has no class for the task.
            AdapterFaults: Several of these.
        """
        if BY_NAME[weights.task].head != "adapter":
            return
        wanted = self.of(weights).state_dict()
        faults: list[AdapterError] = []
        unknown = sorted(set(weights.head) - set(wanted))
        if unknown:
            faults.append(
                UnmatchedTensors(
                    "The adapter has tensors that are no part of its head.",
                    found=", ".join(unknown[:3]),
                    expected=", ".join(sorted(wanted)[:6]),
                )
            )
        missing = sorted(set(wanted) - set(weights.head) - set(self.from_base(weights)))
        if missing:
            faults.append(
                MissingTensors(
                    "The adapter lacks tensors of its head.",
                    found=", ".join(sorted(weights.head)[:6]) or "no saved modules",
                    expected=", ".join(missing[:3]),
                    fix='Train with all parts of the head in "modules_to_save".',
                )
            )
        faults += [
            ShapeMismatch(
                f"The head's {name} has another shape.",
                found=str(tuple(tensor.shape)),
                expected=str(tuple(wanted[name].shape)),
            )
            for name, tensor in weights.head.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ]
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise AdapterFaults(faults)

    def from_base(self, weights: AdapterWeights) -> tuple[str, ...]:
        """Tensors of an adapter's head that it does not bring, because the base has them."""
        wanted = self.of(weights).state_dict()
        return tuple(
            name
            for name, tensor in wanted.items()
            if name not in weights.head and self._beside.get(name) == tuple(tensor.shape)
        )

    def of(self, weights: AdapterWeights) -> Any:
        """The task class for an adapter, on the meta device, a ``Stub`` for its backbone.

        Raises:
            MissingTensors: It reads a pooler that the base does not have.
            UnsupportedOption: The family has no class for the task.
        """
        count = 2 if weights.labels is None else len(weights.labels.names)
        own = {name: weights.head_config[name] for name in sorted(weights.head_config)}
        made = self._made.get(
            (weights.task, count, tuple(own.items())),
            lambda: self._make(weights.task, count, own),
        )
        stub: Stub = getattr(made, made.base_model_prefix)
        if stub.pooled and not self._has_pooler:
            raise MissingTensors(
                "The adapter's head reads a pooler that the base does not have.",
                found=f"no {made.base_model_prefix}.pooler in the base's checkpoint",
                expected="a base with a pooler",
                fix="Serve a base whose checkpoint holds its pooler.",
            )
        return made

    def _make(self, task: Task, labels: int, own: Mapping[str, Any]) -> Any:
        """Build the class by the base's config, and the adapter's ``own`` word on the head."""
        config = copy.deepcopy(self._config)
        config.num_labels = labels
        task_class = _task_class(config, task)
        from huggingface_hub.errors import StrictDataclassError

        try:
            text_config = config.get_text_config()  # of a model of texts alone: itself
            for name, value in own.items():
                place = text_config if name == "pad_token_id" else config
                if hasattr(place, name):  # what the family does not know means nothing to it
                    setattr(place, name, value)
            if getattr(text_config, "pad_token_id", None) is None:
                # An id that no token has: the last token is then the last that is not padding.
                text_config.pad_token_id = self._vocab_size
            with torch.device("meta"):
                made = _without_padding_rows(task_class, config)
        except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
            raise UnsupportedOption(
                "The adapter's config.json asks for a head that cannot be built.",
                found=", ".join(f"{name} = {show(value)}" for name, value in own.items())[:200],
                expected=f"values that {task_class.__name__} takes",
                fix=f"Correct config.json ({type(error).__name__}: {str(error)[:80]}).",
            ) from error
        backbone = getattr(made, made.base_model_prefix)
        pooled = getattr(backbone, "pooler", None) is not None
        setattr(made, made.base_model_prefix, Stub(pooled))
        made.requires_grad_(False)
        made.eval()
        return made


def beside_backbone(model: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of a base's tensors outside of its backbone; the meta device is enough.

    Args:
        model: Plain, or with adapted layers; of quantized ones, the shapes of what they stand for.
        prefix: Where the backbone is; empty where it is the model itself.
    """
    if not prefix:
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.quantized.kind != "dense":
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
    return {name: shape for name, shape in shapes.items() if not name.startswith(f"{prefix}.")}


class Stub(nn.Module):
    """Answers like a backbone, with what was computed already.

    ``pooled`` says whether the head expects what the backbone's pooler makes.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self._hidden: torch.Tensor | None = None
        self._vectors: torch.Tensor | None = None

    def answering(self, hidden: torch.Tensor, pooled: torch.Tensor | None) -> Stub:
        self._hidden, self._vectors = hidden, pooled
        return self

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self._hidden = self._vectors = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        assert self._hidden is not None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=self._hidden, pooler_output=self._vectors
        )


def _task_class(config: Any, task: Task) -> type[Any]:
    """transformers' class for a family and a task whose head the adapter brings."""
    from transformers.models.auto import modeling_auto as auto

    auto_class = BY_NAME[task].auto_class
    assert auto_class is not None
    # AutoModelForQuestionAnswering chooses by MODEL_FOR_QUESTION_ANSWERING_MAPPING.
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", auto_class.removeprefix("AutoModel")).upper()
    found = getattr(auto, f"MODEL_{kind}_MAPPING").get(type(config), None)
    if found is None:
        raise UnsupportedOption(
            f"This base has no head for {task}.",
            found=str(config.model_type),
            expected="a family for which transformers has such a class",
        )
    chosen: type[Any] = found[0] if isinstance(found, tuple) else found
    return chosen


def _without_padding_rows(task_class: type[Any], config: Any) -> Any:
    """Build the class; its backbone is thrown away, so its padding row may be any that exists."""
    text_config = config.get_text_config()
    sentinel = text_config.pad_token_id
    text_config.pad_token_id = max(0, min(sentinel, getattr(text_config, "vocab_size", 1) - 1))
    built = task_class(config)
    built.config.get_text_config().pad_token_id = sentinel
    return built
