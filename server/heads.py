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
    """The base's own language-model head, or an adapter's copy of parts of it, for filled masks.

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
        self._kept: OrderedDict[str, TaskHead | LanguageModelHead] = OrderedDict()
        self._skeletons: dict[tuple[Task, int], Any] = {}
        self._own: LanguageModelHead | None = None

    @property
    def nbytes(self) -> int:
        return sum(head.nbytes for head in self._kept.values() if isinstance(head, TaskHead))

    def task_head(self, version: str, weights: AdapterWeights) -> TaskHead:
        """The head of one adapter version.

        Raises:
            MissingTensors: The adapter has not all tensors of its head.
            UnmatchedTensors: It has tensors that are no part of such a head.
            ShapeMismatch: A tensor of another shape.
            UnsupportedOption: The family has no class for the task.
        """
        found = self._kept.get(version)
        if not isinstance(found, TaskHead):
            found = self._build(weights)
            self._keep(version, found)
        self._kept.move_to_end(version)
        return found

    def language_model_head(
        self, version: str | None, weights: AdapterWeights | None
    ) -> LanguageModelHead:
        """The base's head, with the modules in place of its own that the adapter brings, if any.

        Raises:
            UnmatchedTensors, ShapeMismatch: What the adapter brings does not fit.
        """
        if version is None or weights is None or not weights.head:
            if self._own is None:
                self._own = self._language_model({})
            return self._own
        found = self._kept.get(version)
        if not isinstance(found, LanguageModelHead):
            found = self._language_model(weights.head)
            self._keep(version, found)
        self._kept.move_to_end(version)
        return found

    def forget(self, version: str) -> None:
        self._kept.pop(version, None)

    def _keep(self, version: str, head: TaskHead | LanguageModelHead) -> None:
        self._kept[version] = head
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def _build(self, weights: AdapterWeights) -> TaskHead:
        base = self._base
        labels = _label_names(weights)
        count = 2 if weights.task == "question-answering" else len(labels)
        skeleton = self._skeleton(weights.task, count)
        module = copy.deepcopy(skeleton)
        prefix = module.base_model_prefix
        stub: _Stub = getattr(module, prefix)
        brings_pooler = any(name.startswith(f"{prefix}.pooler.") for name in weights.head)
        if not brings_pooler:
            if stub.pooler is not None and getattr(base.backbone, "pooler", None) is None:
                raise MissingTensors(
                    "The adapter's head reads a pooler that neither it nor the base has.",
                    found="no pooler weights",
                    expected=f"{prefix}.pooler in the base's checkpoint or among modules_to_save",
                    fix='Train with "pooler" in modules_to_save, or serve a base that has one.',
                )
            stub.pooler = None
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
            pooler = getattr(backbone, "pooler", None)
            setattr(found, found.base_model_prefix, _Stub(pooler))
            found.requires_grad_(False)
            found.eval()
            self._skeletons[task, labels] = found
        return found

    def _language_model(self, tensors: Any) -> LanguageModelHead:
        model = self._base.model
        prefix = model.base_model_prefix
        if model.base_model is model:
            raise UnsupportedOption(
                "The base has no language-model head.",
                found=type(model).__name__,
                expected="a base with a masked-language-model head",
            )
        stub = _Stub(None)
        shell = _shallow(model)
        shell._modules[prefix] = stub
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = tensor
        for path, own in modules.items():
            _replace(shell, path, own, self._base)
        return LanguageModelHead(shell, stub)


class _Stub(nn.Module):
    """Answers like a backbone, with what was computed already.

    ``pooler`` is an adapter's own, trained and saved with it.
    """

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self._hidden: torch.Tensor | None = None
        self._pooled: torch.Tensor | None = None

    def answering(self, hidden: torch.Tensor, pooled: torch.Tensor | None) -> _Stub:
        self._hidden, self._pooled = hidden, pooled
        return self

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self._hidden = self._pooled = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        assert self._hidden is not None
        pooled = self._pooled if self.pooler is None else self.pooler(self._hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=self._hidden, pooler_output=pooled
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
    # PEFT names more heads to save than any one family has; absent ones leave no tensors.
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


def _replace(shell: Any, path: str, tensors: dict[str, torch.Tensor], base: LoadedBase) -> None:
    """Put an adapter's own module at ``path`` of a shell; the base's modules stay untouched."""
    parent = shell
    steps = path.split(".")
    for step in steps[:-1]:
        child = parent._modules.get(step)
        if child is None:
            raise _unmatched(path, shell)
        parent._modules[step] = _shallow(child)
        parent = parent._modules[step]
    own = parent._modules.get(steps[-1])
    if own is None:
        raise _unmatched(path, shell)
    for leaf, tensor in tensors.items():
        if own._parameters.get(leaf) is None:
            raise _unmatched(f"{path}.{leaf}", shell)
        _check_shape(f"{path}.{leaf}", tensor, own._parameters[leaf])
    moved = {leaf: tensor.detach().to(base.device, base.dtype) for leaf, tensor in tensors.items()}
    if hasattr(own, "layer_signature"):
        bias = moved.get("bias", own._parameters.get("bias"))
        parent._modules[steps[-1]] = _Dense(moved.get("weight", own._parameters["weight"]), bias)
        return
    copied = _shallow(own)
    for leaf, tensor in moved.items():
        copied._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    parent._modules[steps[-1]] = copied


class _Dense(nn.Module):
    """A linear layer that an adapter saved whole."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _shallow(module: Any) -> Any:
    """A module with the same parameters and children, whose tables can be changed apart."""
    copied = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[table] = dict(module.__dict__[table])
    return copied


def _unmatched(path: str, shell: Any) -> UnmatchedTensors:
    return UnmatchedTensors(
        "The adapter has tensors that are no part of the base's language-model head.",
        found=path,
        expected=f"a module of {type(shell).__name__}",
    )
