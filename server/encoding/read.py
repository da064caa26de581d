"""From the backbone's hidden states to the answers of one adapter's rows for one task.

Chooses the head and the way to read its logits; what a head computes is in
``server.encoding.heads``, what a client sees in ``server.encoding.postprocess``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adapters import segments
from adapters.errors import AdapterError
from adapters.intake.pooling import base_pooling
from adapters.tasks import BY_NAME, Task
from server.base.load import LoadedBase
from server.encoding import postprocess
from server.encoding.heads import Heads
from server.failures import NotFinite, TaskMismatch, is_expected, is_lost
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import EncodeRequest

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowGroup:
    """Rows of one batch that belong to one adapter (None: the bare base) and one task.

    Args:
        hidden: ``[n, T, H]``.
        pooled: ``[n, H]``, where the base has a pooler.
        ids, mask: ``[n, T]``, padded on the right; of images, ones.
    """

    version: str | None
    task: Task
    slot: int
    requests: Sequence[EncodeRequest]
    items: Sequence[Any]  # ModelInput, all of one kind
    hidden: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor
    mask: torch.Tensor

    def each(self, answer: Callable[[int], Any]) -> list[Any]:
        """The answer, or the exception that took its place, for each row.

        Raises:
            Exception: The device itself is lost.
        """
        found: list[Any] = []
        for index in range(len(self.items)):
            try:
                found.append(answer(index))
            except Exception as error:
                if is_lost(error):
                    raise
                if not is_expected(error):
                    logger.exception("A row of version %s failed", self.version)
                found.append(error.with_traceback(None))
        return found

    def halves(self) -> list[RowGroup]:
        """The group as two, in order."""
        half = len(self.items) // 2
        return [self._rows(slice(None, half)), self._rows(slice(half, None))]

    def _rows(self, rows: slice) -> RowGroup:
        return replace(
            self,
            requests=self.requests[rows],
            items=self.items[rows],
            hidden=self.hidden[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
            ids=self.ids[rows],
            mask=self.mask[rows],
        )


class Reader:
    """Reads groups of rows; keeps the heads of the adapters used last.

    Args:
        base: The loaded base.
        inputs: Its tokenizer, or its image processor.
        heads_kept: How many heads.
        head_bytes: Of all of them together.
    """

    def __init__(
        self, base: LoadedBase, inputs: Text | Images, *, heads_kept: int, head_bytes: int
    ) -> None:
        self._base = base
        self._inputs = inputs
        self._heads = Heads(base, heads_kept, head_bytes)
        self._declared = base_pooling(base.folder, base.adapted.signature.max_length)
        if isinstance(self._declared, AdapterError):
            logger.warning("%s (found %s)", self._declared.message, self._declared.found)
        else:
            for note in self._declared.notes:
                logger.warning("The base's %s", note)
        self._pooling: postprocess.Pooling = "mean"
        if isinstance(inputs, Images):
            self._pooling = "cls"  # what classifiers of images read
        elif _is_decoder(base.config):
            self._pooling = "last"

    @property
    def _text(self) -> Text:
        assert isinstance(self._inputs, Text)  # tasks of texts are refused on a base of images
        return self._inputs

    @property
    def head_bytes(self) -> int:
        return self._heads.nbytes

    def headed(self) -> set[str]:
        """Versions whose head is kept."""
        return self._heads.versions()

    def forget(self, version: str) -> None:
        self._heads.forget(version)

    def read_apart(self, group: RowGroup, weights: AdapterWeights | None) -> list[Any]:
        """``read``, but what it raises takes the place of answers: of all rows where they have it
        in common, else only of the rows at fault, which are found by halves.

        Raises:
            Exception: The device itself is lost.
        """
        try:
            return self.read(group, weights)
        except Exception as error:
            if is_lost(error):
                raise
            if is_expected(error) or len(group.items) == 1:
                if not is_expected(error):
                    logger.exception("The head of version %s failed", group.version)
                return [error.with_traceback(None)] * len(group.items)
        return [answer for half in group.halves() for answer in self.read_apart(half, weights)]

    def read(self, group: RowGroup, weights: AdapterWeights | None) -> list[Any]:
        """An answer, or an exception of that row's own, for each row of the group.

        Embeddings are of whatever the adapter was trained for. They are made as the request says,
        else as the adapter declares, else as the base does. Where nobody says: the mean over the
        tokens for encoders, the last token for decoders (the only one that has read the whole
        text), the class token for images; of length 1.

        Raises:
            TaskMismatch: The adapter, or the bare base, does something else.
            AdapterError: The head is wrong, or the base declares vectors that are not served.
        """
        row = BY_NAME[group.task]
        if row.head is None:
            return self._vectors(group, weights)
        if weights is not None and group.task not in (weights.task, *BY_NAME[weights.task].also):
            raise TaskMismatch(group.task, weights.task)
        if row.head == "base":
            return self._at_masks(group)
        if weights is None or group.version is None:
            raise TaskMismatch(group.task, None)
        head = self._heads.task_head(group.version, weights)
        logits = head(group.hidden, group.pooled, group.ids, group.mask).cpu()
        return self._answers(group, logits, labels=head.labels, problem_type=head.problem_type)

    def fault_of_base(
        self, task: Task, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> Exception | None:
        """Why the bare base cannot answer one row, as far as no adapter's head has a part in it.

        Args:
            task: Asked for.
            hidden: ``[T, H]`` of the bare base.
            ids, mask: ``[T]``.

        Raises:
            Exception: The base's own head does.
        """
        values = hidden[mask == 1]
        if BY_NAME[task].needs_mask:
            is_mask = (ids == self._text.mask_id) & (mask == 1)
            plan = segments.from_runs([(segments.BASE_SLOT, int(is_mask.sum()))])
            with self._base.adapted.batch(plan):
                values = self._heads.language_model_head()(hidden[is_mask].unsqueeze(0))[0]
        try:
            postprocess.check_finite(values)
        except NotFinite as error:
            return error
        return None

    def _answers(
        self, group: RowGroup, values: torch.Tensor | Sequence[torch.Tensor], **more: Any
    ) -> list[Any]:
        """Of each row, by the task's postprocessor; ``values`` are as ``Reading`` has them."""
        answer = postprocess.POSTPROCESSORS[group.task]
        text = self._inputs if isinstance(self._inputs, Text) else None
        return group.each(
            lambda index: answer(
                postprocess.Reading(
                    values[index], group.items[index], group.requests[index], text, **more
                )
            )
        )

    def _vectors(self, group: RowGroup, weights: AdapterWeights | None) -> list[Any]:
        answer = postprocess.POSTPROCESSORS[group.task]

        def vector(index: int) -> Any:
            request = group.requests[index]
            pooling, normalize = self._vector_options(request, weights)
            return answer(
                postprocess.Reading(
                    group.hidden[index][group.mask[index] == 1],
                    group.items[index],
                    request,
                    pooling=pooling,
                    normalize=normalize,
                )
            )

        return group.each(vector)

    def _vector_options(
        self, request: EncodeRequest, weights: AdapterWeights | None
    ) -> tuple[postprocess.Pooling, bool]:
        pooling, normalize = request.options.get("pooling"), request.options.get("normalize")
        declared = self._declared
        if weights is not None and weights.pooling.mode is not None:
            declared = weights.pooling
        if isinstance(declared, AdapterError):
            if pooling is None:
                raise declared
        else:
            pooling = pooling or declared.mode
            if normalize is None and declared.mode is not None:
                normalize = declared.normalize
        return pooling or self._pooling, normalize is not False

    def _at_masks(self, group: RowGroup) -> list[Any]:
        head = self._heads.language_model_head()
        is_mask = (group.ids == self._text.mask_id) & (group.mask == 1)
        counts: list[int] = is_mask.sum(1).tolist()
        # The head's own layers may be adapted, too; it sees the masks alone.
        with self._base.adapted.batch(segments.from_runs([(group.slot, sum(counts))])):
            logits = head(group.hidden[is_mask].unsqueeze(0))[0].cpu()
        return self._answers(group, torch.split(logits, counts))


def _is_decoder(config: Any) -> bool:
    """Whether its tokens see only those before them."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return causal is not None and MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None) is None
