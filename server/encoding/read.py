"""From the backbone's hidden states to the answers of one adapter's rows for one task.

Chooses the head and the way to read its logits; what a head computes is in
``server.encoding.heads``, what a client sees in ``server.encoding.postprocess``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from adapters import segments
from adapters.errors import AdapterError, in_a_line
from adapters.intake.pooling import base_pooling
from adapters.tasks import BY_NAME, Task
from server.base.load import LoadedBase
from server.encoding import postprocess
from server.encoding.head_stacks import (
    HeadRows,
    TimedStacks,
    logits_together,
)
from server.encoding.heads import Heads, TaskHead
from server.failures import NotFinite, TaskMismatch, is_expected, is_lost
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import EncodeRequest

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights

logger = logging.getLogger(__name__)

# Devices on which vectors are pooled by few operators, and all answers of a batch come back in one
# copy, without a comparison at the start. It is meant for CUDA, where a launch costs more than what
# it does; none is listed, and there ``Reader.compare_together`` decides.
TOGETHER_ON: frozenset[str] = frozenset()
# Of a pooled state, relative: what sums in another order may cost.
_POOLED_TOLERANCE = 1e-3
# Heads of one shape run as one up to this size, by device. Their numbers are put side by side for
# it. On a CPU, 32 heads took 0.26 to 0.41 of the time with 6 KB each and 1.7 to 2.4 times the time
# with 2.4 MB each. On a device that is not named both ways are compared and timed on the traffic.
STACKED_HEAD_BYTES: Mapping[str, int] = {"cpu": 64 << 10}


@dataclass(frozen=True, slots=True)
class BatchStates:
    """What the backbone made of a whole batch.

    Args:
        hidden: ``[N, T, H]``.
        pooled: ``[N, H]``, where the base has a pooler.
        ids, mask: ``[N, T]``, padded on the right; of images, ones.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class RowGroup:
    """Rows of one batch that belong to one adapter (None: the bare base) and one task.

    Args:
        rows: Which rows of ``states``, n of them.
        states: Of the whole batch.
    """

    version: str | None
    task: Task
    slot: int
    requests: Sequence[EncodeRequest]
    items: Sequence[Any]  # ModelInput, all of one kind
    rows: Sequence[int]
    states: BatchStates

    @cached_property
    def hidden(self) -> torch.Tensor:
        """``[n, T, H]``."""
        return self.states.hidden[list(self.rows)]

    @cached_property
    def pooled(self) -> torch.Tensor | None:
        """``[n, H]``."""
        return None if self.states.pooled is None else self.states.pooled[list(self.rows)]

    @cached_property
    def ids(self) -> torch.Tensor:
        """``[n, T]``."""
        return self.states.ids[list(self.rows)]

    @cached_property
    def mask(self) -> torch.Tensor:
        """``[n, T]``."""
        return self.states.mask[list(self.rows)]

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
        return [self._some(slice(None, half)), self._some(slice(half, None))]

    def _some(self, some: slice) -> RowGroup:
        return replace(
            self, requests=self.requests[some], items=self.items[some], rows=self.rows[some]
        )


@dataclass(frozen=True, slots=True)
class Computed:
    """What was computed for a group of rows, and how answers are made of it.

    Args:
        values: Where it was computed; None: the answers are made of the hidden states.
        answers: Of each row, given the values on the host.
    """

    values: torch.Tensor | None
    answers: Callable[[Any], list[Any]]


class Reader:
    """Reads groups of rows; keeps the heads of the adapters used last.

    Args:
        base: The loaded base.
        inputs: Its tokenizer, or its image processor.
        heads_kept: How many heads.
        head_bytes: Of all of them together.
        alone: Every head runs by itself: in one product with others its bits may be others.
    """

    def __init__(
        self,
        base: LoadedBase,
        inputs: Text | Images,
        *,
        heads_kept: int,
        head_bytes: int,
        alone: bool = False,
    ) -> None:
        self._base = base
        self._inputs = inputs
        self._heads = Heads(base, heads_kept, head_bytes)
        self._alone = alone
        self._compared = False  # pooling together, and found the same
        self._apart: set[Hashable] = set()  # kinds of heads that do not run together
        self._stacks = TimedStacks(base.device)
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

    @property
    def is_together(self) -> bool:
        """Whether answers of a batch come back in one copy."""
        return self._compared or self._base.device.type in TOGETHER_ON

    def compare_together(self, states: BatchStates) -> float:
        """Pool some states by few operators and one copy, and each row as elsewhere: from now on
        the former, if they agree.

        Args:
            states: Of any texts.

        Returns:
            The largest relative difference.
        """
        rows = len(states.hidden)
        modes = [one for one in postprocess.POOLINGS for _ in range(rows)]
        many = len(postprocess.POOLINGS)
        pooled = pooled_states(states.hidden.repeat(many, 1, 1), states.mask.repeat(many, 1), modes)
        (found,) = in_one_copy([pooled], together=True)
        worst = 0.0
        for at, mode in enumerate(modes):
            text = states.hidden[at % rows][states.mask[at % rows] == 1]
            wanted = torch.tensor(postprocess.embed(text, pooling=mode, normalize=False))
            error = float((found[at] - wanted).norm() / wanted.norm().clamp_min(1e-12))
            worst = max(worst, error if isfinite(error) else float("inf"))
        self._compared = worst <= _POOLED_TOLERANCE
        return worst

    def read_all(self, groups: Sequence[tuple[RowGroup, AdapterWeights | None]]) -> list[list[Any]]:
        """An answer, or the exception that took its place, for each row of each group.

        What a head raises takes the place of answers: of all rows where they have it in common,
        else only of the rows at fault, which are found by halves.

        Raises:
            Exception: The device itself is lost.
        """
        together = self._together(groups)
        found: list[list[Any]] = [[] for _ in groups]
        pieces: list[tuple[list[Any], Computed]] = []
        for number, (group, weights) in enumerate(groups):
            if number in together:
                pieces.append((found[number], together[number]))
            else:
                pieces += [(found[number], one) for one in self._computed_apart(group, weights)]
        values = in_one_copy(
            [one.values for _, one in pieces if one.values is not None],
            together=self.is_together,
        )
        on_host = iter(values)
        for answers, one in pieces:
            answers.extend(one.answers(None if one.values is None else next(on_host)))
        return found

    def _together(
        self, groups: Sequence[tuple[RowGroup, AdapterWeights | None]]
    ) -> dict[int, Computed]:
        """Groups whose heads ran as one, by their numbers; the others run one by one.

        Raises:
            Exception: The device itself is lost.
        """
        found: dict[int, Computed] = {}
        if self._alone:
            return found
        most_bytes = STACKED_HEAD_BYTES.get(self._base.device.type)
        alike: dict[Hashable, list[tuple[int, TaskHead]]] = {}
        for number, (group, weights) in enumerate(groups):
            try:
                head = self._head_of(group, weights)
            except Exception as error:
                if is_lost(error):
                    raise
                continue  # it is raised again where the group runs alone
            if head is None or (most_bytes is not None and head.nbytes > most_bytes):
                continue
            if head.alike not in self._apart:
                alike.setdefault(head.alike, []).append((number, head))
        for key, members in alike.items():
            if len(members) < 2:
                continue
            heads = [head for _, head in members]
            own = [groups[number][0] for number, _ in members]
            try:
                rows = _head_rows(own)
                timed = most_bytes is None
                logits = (self._stacks.logits if timed else logits_together)(heads, rows)
            except Exception as error:
                if is_lost(error):
                    raise
                self._apart.add(key)
                logger.warning("Heads like these run one by one: %s", in_a_line(error))
                continue
            for (number, head), one in zip(members, logits, strict=True):
                found[number] = self._of_head(groups[number][0], head, one)
        return found

    def _computed_apart(self, group: RowGroup, weights: AdapterWeights | None) -> list[Computed]:
        try:
            return [self._computed(group, weights)]
        except Exception as error:
            if is_lost(error):
                raise
            if is_expected(error) or len(group.items) == 1:
                if not is_expected(error):
                    logger.exception("The head of version %s failed", group.version)
                told = [error.with_traceback(None)] * len(group.items)
                return [Computed(None, lambda _: told)]
        return [one for half in group.halves() for one in self._computed_apart(half, weights)]

    def _computed(self, group: RowGroup, weights: AdapterWeights | None) -> Computed:
        """What an answer, or an exception of that row's own, is made of for each row of a group.

        Embeddings are of whatever the adapter was trained for. They are made as the request says,
        else as the adapter declares, else as the base does. Where nobody says: the mean over the
        tokens for encoders, the last token for decoders (the only one that has read the whole
        text), the class token for images; of length 1.

        Raises:
            TaskMismatch: The adapter, or the bare base, does something else.
            AdapterError: The head is wrong, or the base declares vectors that are not served.
        """
        if BY_NAME[group.task].head is None:
            return self._vectors(group, weights)
        head = self._head_of(group, weights)
        if head is None:
            return self._at_masks(group)
        return self._of_head(group, head, head(group.hidden, group.pooled, group.ids, group.mask))

    def _head_of(self, group: RowGroup, weights: AdapterWeights | None) -> TaskHead | None:
        """The adapter's head that a group needs; None: its task needs none, or the base's own.

        Raises:
            TaskMismatch: The adapter, or the bare base, does something else.
            AdapterError: The head is wrong.
        """
        row = BY_NAME[group.task]
        if row.head is None:
            return None
        if weights is not None and group.task not in (weights.task, *BY_NAME[weights.task].also):
            raise TaskMismatch(group.task, weights.task)
        if row.head == "base":
            return None
        if weights is None or group.version is None:
            raise TaskMismatch(group.task, None)
        return self._heads.task_head(group.version, weights)

    def _of_head(self, group: RowGroup, head: TaskHead, logits: torch.Tensor) -> Computed:
        return Computed(
            logits,
            lambda values: self._answers(
                group, values, labels=head.labels, problem_type=head.problem_type
            ),
        )

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

    def _vectors(self, group: RowGroup, weights: AdapterWeights | None) -> Computed:
        answer = postprocess.POSTPROCESSORS[group.task]
        options = group.each(lambda index: self._vector_options(group.requests[index], weights))

        def answers(states: Callable[[int], torch.Tensor]) -> list[Any]:
            def vector(index: int) -> Any:
                if isinstance(options[index], Exception):
                    raise options[index]
                pooling, normalize = options[index]
                return answer(
                    postprocess.Reading(
                        states(index),
                        group.items[index],
                        group.requests[index],
                        pooling=pooling,
                        normalize=normalize,
                    )
                )

            return group.each(vector)

        if not self.is_together:
            of_row = lambda index: group.hidden[index][group.mask[index] == 1]  # noqa: E731
            return Computed(None, lambda _: answers(of_row))
        # One state a row, of which any pooling makes what it is.
        modes: list[postprocess.Pooling] = [
            "mean" if isinstance(one, Exception) else one[0] for one in options
        ]
        pooled = pooled_states(group.hidden, group.mask, modes)
        return Computed(pooled, lambda values: answers(lambda index: values[index : index + 1]))

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

    def _at_masks(self, group: RowGroup) -> Computed:
        head = self._heads.language_model_head()
        mask_id = self._text.mask_id
        places = [
            (row, place)
            for row, item in zip(group.rows, group.items, strict=True)
            for place, token in enumerate(item.token_ids)
            if token == mask_id
        ]
        counts = [item.token_ids.count(mask_id) for item in group.items]
        rows, columns = (torch.tensor([one[side] for one in places]).long() for side in (0, 1))
        # The head's own layers may be adapted, too; it sees the masks alone.
        with self._base.adapted.batch(segments.from_runs([(group.slot, sum(counts))])):
            logits = head(group.states.hidden[rows, columns].unsqueeze(0))[0]
        return Computed(logits, lambda values: self._answers(group, torch.split(values, counts)))


def pooled_states(
    hidden: torch.Tensor, mask: torch.Tensor, modes: Sequence[postprocess.Pooling]
) -> torch.Tensor:
    """One state for each row, in float32, by few operators for all rows.

    Args:
        hidden: ``[n, T, H]``.
        mask: ``[n, T]``, 1 for tokens and 0 for padding (on the right).
        modes: Of each row.

    Returns:
        ``[n, H]``; NaN where any state of a row is not finite.
    """
    states = hidden.float()
    of_text = mask == 1
    finite = (torch.isfinite(states).all(-1) | ~of_text).all(-1)
    lengths = of_text.sum(1)
    summed = states.masked_fill(~of_text[..., None], 0.0).sum(1)
    last = states.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
    kind = torch.tensor([postprocess.POOLINGS.index(one) for one in modes]).to(hidden.device)[
        :, None
    ]
    pooled = torch.where(kind == 1, states[:, 0], summed / lengths[:, None])
    pooled = torch.where(kind == 2, last, pooled)
    return pooled.masked_fill(~finite[:, None], float("nan"))


def in_one_copy(values: Sequence[torch.Tensor], *, together: bool) -> list[torch.Tensor]:
    """Tensors of one device on the host: ``together`` by one copy and in float32, else each."""
    if not values or not together:
        return [one.cpu() for one in values]
    flat = torch.cat([one.float().reshape(-1) for one in values]).cpu()
    parts = torch.split(flat, [one.numel() for one in values])
    return [part.view(one.shape) for part, one in zip(parts, values, strict=True)]


def _head_rows(groups: Sequence[RowGroup]) -> HeadRows:
    """Groups of one batch as heads that run together read them."""
    states = groups[0].states
    rows = [group.rows for group in groups]
    return HeadRows(states.hidden, states.pooled, states.ids, states.mask, rows)


def _is_decoder(config: Any) -> bool:
    """Whether its tokens see only those before them."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return causal is not None and MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None) is None
