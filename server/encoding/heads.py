"""Task heads: each adapter's own, on the hidden states of the one backbone.

A head is the task class of transformers with a stub where its backbone would be. The stub answers
with rows of the backbone output that the lane computed for everybody, so what the family does
between backbone and logits (pooling, activations, the last token) is the family's own code. The
task class is built on the meta device; only the head's tensors become real.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from adapters.errors import UnsupportedOption
from adapters.layers.adapted import AdaptedLinear
from adapters.tasks import BY_NAME
from server.base.load import LoadedBase
from server.base.plan import name_is_headed
from server.base.skeletons import Skeletons, Stub, beside_backbone

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights

logger = logging.getLogger(__name__)


class TaskHead:
    """One adapter's head.

    Args:
        module: The task class with a stub for its backbone.
        stub: That stub.
        pad_id: What tells padding from tokens for heads that read the last token; None for heads
            of images, which have neither.
        labels: Names of the logits; empty for question answering.
        problem_type: How logits become scores; None where the config says nothing.
        alike: The same for heads that differ in nothing but their numbers and labels.

    ``tensors`` are its parameters by name.
    """

    def __init__(
        self,
        module: Any,
        stub: Stub,
        pad_id: int | None,
        labels: tuple[str, ...],
        problem_type: str | None,
        *,
        alike: Hashable,
    ) -> None:
        self.alike = alike
        self.labels = labels
        self.problem_type = problem_type
        self.pad_id = pad_id
        self.tensors: Mapping[str, torch.Tensor] = dict(module.named_parameters())
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
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
            token_ids: ``[n, T]``; of images, anything.
            mask: ``[n, T]``, 1 for tokens and 0 for padding (on the right).

        Returns:
            ``[n, labels]``; ``[n, T, labels]`` for tokens; ``[n, T, 2]``, start and end, for
            question answering.
        """
        return self.with_tensors(None, hidden, pooled, token_ids, mask)

    def with_tensors(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        hidden: torch.Tensor,
        pooled: torch.Tensor | None,
        token_ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """As a call, with other parameters of the same shapes; None: its own."""
        inputs: dict[str, Any] = {"pixel_values": None}
        if self.pad_id is not None:
            ids = token_ids.masked_fill(mask == 0, self.pad_id)
            inputs = {"input_ids": ids, "attention_mask": mask}
        with self._stub.answering(hidden.float(), None if pooled is None else pooled.float()):
            if tensors is None:
                out = self._module(**inputs)
            else:
                out = torch.func.functional_call(self._module, dict(tensors), (), inputs)
        if hasattr(out, "start_logits"):
            return torch.stack((out.start_logits, out.end_logits), dim=-1)
        logits: torch.Tensor = out.logits
        return logits


class LanguageModelHead:
    """The base's own language-model head, for filled masks.

    Its adapted layers follow the batch that is active when it is called.
    """

    def __init__(self, module: Any, stub: Stub) -> None:
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
        budget_bytes: Of their tensors together. A head larger than that is made anew for each
            batch and never kept.
    """

    def __init__(self, base: LoadedBase, capacity: int, budget_bytes: int) -> None:
        self._base = base
        self._capacity = capacity
        self._budget_bytes = budget_bytes
        self._nbytes = 0  # of those kept
        self._kept: OrderedDict[str, TaskHead] = OrderedDict()
        self._skeletons = Skeletons(
            base.config,
            base.adapted.signature.vocab_size,
            has_pooler=getattr(base.backbone, "pooler", None) is not None,
            beside=beside_backbone(base.model, base.adapted.signature.prefix),
        )
        self._own: LanguageModelHead | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the heads that are kept: never more than the budget."""
        return self._nbytes

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
            found = self._build(weights)
            self._keep(version, found)
        else:
            self._kept.move_to_end(version)
        return found

    def _keep(self, version: str, head: TaskHead) -> None:
        """Keep a head in place of those used longest ago, unless it alone is over the budget."""
        if head.nbytes > self._budget_bytes:
            logger.warning(
                "The head of version %s has %d bytes and head_bytes is %d: it is made for each "
                "batch anew",
                version,
                head.nbytes,
                self._budget_bytes,
            )
            return
        while self._kept and (
            len(self._kept) >= self._capacity or self._nbytes + head.nbytes > self._budget_bytes
        ):
            self._nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[version] = head
        self._nbytes += head.nbytes

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
            stub = Stub()
            shell.__dict__["_modules"] = {**model._modules, model.base_model_prefix: stub}
            self._own = LanguageModelHead(shell, stub)
        return self._own

    def versions(self) -> set[str]:
        """Those whose head is kept."""
        return set(self._kept)

    def forget(self, version: str) -> None:
        gone = self._kept.pop(version, None)
        self._nbytes -= 0 if gone is None else gone.nbytes

    def _build(self, weights: AdapterWeights) -> TaskHead:
        self._skeletons.check(weights)
        module = copy.deepcopy(self._skeletons.of(weights))
        tensors = {
            name: tensor.detach().to(self._base.device, torch.float32)
            for name, tensor in weights.head.items()
        }
        tensors |= {name: self._of_base(name) for name in self._skeletons.from_base(weights)}
        module.load_state_dict(tensors, strict=True, assign=True)
        row = BY_NAME[weights.task]
        named = weights.labels is not None and row.output_names is None
        labels = weights.labels.names if named and weights.labels is not None else ()
        problem = weights.labels.problem_type if weights.labels is not None else None
        stub: Stub = getattr(module, module.base_model_prefix)
        pad_id = int(module.config.get_text_config().pad_token_id) if "texts" in row.takes else None
        shapes = tuple((name, tuple(one.shape)) for name, one in module.named_parameters())
        own = tuple((name, str(value)) for name, value in sorted(weights.head_config.items()))
        alike = (type(module), shapes, own, pad_id)
        return TaskHead(module, stub, pad_id, labels, problem, alike=alike)

    def _of_base(self, name: str) -> torch.Tensor:
        """A tensor beside the base's backbone, in float32."""
        path, _, parameter = name.rpartition(".")
        layer = self._base.model.get_submodule(path)
        if parameter == "weight" and isinstance(layer, AdaptedLinear):
            own: torch.Tensor = layer.quantized.dequantize(dtype=torch.float32)
            return own
        tensor: torch.Tensor = getattr(layer, parameter)
        return tensor.detach().to(self._base.device, torch.float32)
