"""Task heads: each adapter's own, on the hidden states of the one backbone.

A head is the task class of transformers with a stub where its backbone would be. The stub answers
with rows of the backbone output that the lane computed for everybody, so what the family does
between backbone and logits (pooling, activations, the last token) is the family's own code. The
task class is built on the meta device; only the head's tensors become real.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapters.errors import MissingTensors, ShapeMismatch, UnmatchedTensors, UnsupportedOption
from server.base_model import LoadedBase
from server.base_plan import name_is_headed
from server.messages import Task

if TYPE_CHECKING:
    from adapters.checkpoint import AdapterWeights

HEADED: frozenset[Task] = frozenset(
    {"text-classification", "token-classification", "question-answering"}
)


class TaskHead:
    """One adapter's head.

    Args:
        module: The task class with a stub for its backbone.
        stub: That stub.
        pad_id: What tells padding from tokens for heads that read the last token.
        labels: Names of the logits; empty for question answering.
        problem_type: How logits become scores; None where the config says nothing.
        nbytes: Of its tensors.
    """

    def __init__(
        self,
        module: Any,
        stub: _Stub,
        pad_id: int,
        labels: tuple[str, ...],
        problem_type: str | None,
    ) -> None:
        self.labels = labels
        self.problem_type = problem_type
        self.pad_id = pad_id
        self.nbytes = sum(parameter.nbytes for parameter in module.parameters())
        self._module = module
        self._stub = stub

    def __call__(
        self,
        hidden: torch.Tensor,
        pooled: torch.Tensor | None,
        token_ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of some rows of a batch, in float32.

        Args:
            hidden: ``[n, T, H]``, the backbone's output.
            pooled: ``[n, H]``, its pooler's, where it has one.
            token_ids: ``[n, T]``.
            mask: ``[n, T]``, 1 for tokens and 0 for padding (on the right).

        Returns:
            ``[n, labels]``; ``[n, T, labels]`` for tokens; ``[n, T, 2]``, start and end, for
            question answering.
        """
        ids = token_ids.masked_fill(mask == 0, self.pad_id)
        with self._stub.answering(hidden.float(), None if pooled is None else pooled.float()):
            out = self._module(input_ids=ids, attention_mask=mask)
        if hasattr(out, "start_logits"):
            return torch.stack((out.start_logits, out.end_logits), dim=-1)
        logits: torch.Tensor = out.logits
        return logits


class LanguageModelHead:
    """The base's own language-model head, for filled masks.

    Its adapted layers follow the batch that is active when it is called.
    """

    def __init__(self, module: Any, stub: _Stub) -> None:
        self._module = module
        self._stub = stub

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, M, H]`` hidden states to ``[1, M, vocabulary]`` logits, in float32."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._stub.answering(hidden, None):
            logits: torch.Tensor = self._module(input_ids=ids).logits
        return logits.float()


class Heads:
    """Makes heads when they are first needed and keeps those used last.

    Args:
        base: The loaded base.
        capacity: Heads kept at once.
    """

    def __init__(self, base: LoadedBase, capacity: int) -> None:
        self._base = base
        self._capacity = capacity
        self._kept: OrderedDict[str, TaskHead] = OrderedDict()
        self._skeletons: dict[tuple[Task, int], Any] = {}
        self._own: LanguageModelHead | None = None

    @property
    def nbytes(self) -> int:
        return sum(head.nbytes for head in self._kept.values())

    def task_head(self, version: str, weights: AdapterWeights) -> TaskHead:
        """The head of one adapter version.

        Raises:
            MissingTensors: The adapter has not all tensors of its head.
            UnmatchedTensors: It has tensors that are no part of such a head.
            ShapeMismatch: A tensor of another shape.
            UnsupportedOption: The family has no class for the task.
        """
        found = self._kept.get(version)
        if found is None:
            found = self._kept[version] = self._build(weights)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(version)
        return found

    def language_model_head(self) -> LanguageModelHead:
        """The base's own language-model head.

        Raises:
            UnsupportedOption: The base is a bare backbone.
        """
        if self._own is None:
            model = self._base.model
            if not name_is_headed(type(model).__name__):
                raise UnsupportedOption(
                    "The base has no language-model head.",
                    found=type(model).__name__,
                    expected="a base with a masked-language-model head",
                )
            # The same modules under another backbone: the tables of the copy are its own.
            shell = copy.copy(model)
            stub = _Stub()
            shell.__dict__["_modules"] = {**model._modules, model.base_model_prefix: stub}
            self._own = LanguageModelHead(shell, stub)
        return self._own

    def forget(self, version: str) -> None:
        self._kept.pop(version, None)

    def _build(self, weights: AdapterWeights) -> TaskHead:
        base = self._base
        labels = _label_names(weights)
        count = 2 if weights.task == "question-answering" else len(labels)
        skeleton = self._skeleton(weights.task, count)
        module = copy.deepcopy(skeleton)
        prefix = module.base_model_prefix
        stub: _Stub = getattr(module, prefix)
        if stub.pooled and getattr(base.backbone, "pooler", None) is None:
            raise MissingTensors(
                "The adapter's head reads a pooler that the base does not have.",
                found=f"no {prefix}.pooler in the base's checkpoint",
                expected="a base with a pooler",
                fix="Serve a base whose checkpoint holds its pooler.",
            )
        tensors = {
            name: tensor.detach().to(base.device, torch.float32)
            for name, tensor in weights.head.items()
        }
        _fill(module, tensors)
        problem = weights.labels.problem_type if weights.labels is not None else None
        return TaskHead(module, stub, int(module.config.pad_token_id), labels, problem)

    def _skeleton(self, task: Task, labels: int) -> Any:
        found = self._skeletons.get((task, labels))
        if found is None:
            base = self._base
            config = copy.deepcopy(base.config)
            config.num_labels = labels
            if getattr(config, "pad_token_id", None) is None:
                # An id that no token has: the last token is then the last that is not padding.
                config.pad_token_id = base.adapted.signature.vocab_size
            task_class = _task_class(config, task)
            with torch.device("meta"):
                found = _without_padding_rows(task_class, config)
            backbone = getattr(found, found.base_model_prefix)
            pooled = getattr(backbone, "pooler", None) is not None
            setattr(found, found.base_model_prefix, _Stub(pooled))
            found.requires_grad_(False)
            found.eval()
            self._skeletons[task, labels] = found
        return found


class _Stub(nn.Module):
    """Answers like a backbone, with what was computed already.

    ``pooled`` says whether the head expects what the backbone's pooler makes.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self._hidden: torch.Tensor | None = None
        self._vectors: torch.Tensor | None = None

    def answering(self, hidden: torch.Tensor, pooled: torch.Tensor | None) -> _Stub:
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
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "text-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token-classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    }
    found = mappings[task].get(type(config), None) if task in mappings else None
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
    sentinel = config.pad_token_id
    config.pad_token_id = min(sentinel, config.vocab_size - 1)
    built = task_class(config)
    built.config.pad_token_id = sentinel
    return built


def _label_names(weights: AdapterWeights) -> tuple[str, ...]:
    if weights.task == "question-answering":
        return ()
    if weights.labels is not None:
        return weights.labels.names
    last = [tensor for name, tensor in weights.head.items() if name.endswith(".weight")][-1:]
    if not last:
        raise MissingTensors(
            f"The adapter does {weights.task} and has no head.",
            found="no saved modules",
            expected="the tensors of its head",
            fix='Train with the head in "modules_to_save".',
        )
    return tuple(f"LABEL_{index}" for index in range(last[0].shape[0]))


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    wanted = dict(module.state_dict())
    unknown = sorted(set(tensors) - set(wanted))
    if unknown:
        raise UnmatchedTensors(
            "The adapter has tensors that are no part of its head.",
            found=", ".join(unknown[:3]),
            expected=", ".join(sorted(wanted)[:6]),
        )
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise MissingTensors(
            "The adapter lacks tensors of its head.",
            found=", ".join(sorted(tensors)[:6]) or "no saved modules",
            expected=", ".join(missing[:3]),
            fix='Train with all parts of the head in "modules_to_save".',
        )
    for name, tensor in tensors.items():
        _check_shape(name, tensor, wanted[name])
    module.load_state_dict(tensors, strict=True, assign=True)


def _check_shape(name: str, tensor: torch.Tensor, wanted: torch.Tensor) -> None:
    if tensor.shape != wanted.shape:
        raise ShapeMismatch(
            f"The head's {name} has another shape.",
            found=str(tuple(tensor.shape)),
            expected=str(tuple(wanted.shape)),
        )
