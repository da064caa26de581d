"""One forward of the generate lane: which tokens of which sequences, and the model run over them.

Sequences are flattened to one row per token, rows of one adapter side by side. Who may run at all,
and what happens to the tokens that come out, is left to ``server.generation.lane``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from adapters import segments
from server.base.captured_steps import LAUNCH_CLASSES, GraphPool, StepKey
from server.base.rope import RopeByLength
from server.failures import is_lost, split_apart
from server.generation.attention import (
    PAGED_ATTENTION,
    PagedBatch,
    PagedKeys,
    Span,
    check_all_attended,
)
from server.generation.kv_cache import KVCache
from server.generation.page_attention import (
    VARLEN_PAGE_TOKENS,
    VarlenBatch,
    decode_by_varlen,
    decode_in_torch,
)
from server.generation.sampling import Choice, choose, likeliest_of, logprobs_of
from server.generation.sequences import ScheduledRows, Sequence
from server.generation.static_step import LaunchedStep, StaticStep
from server.messages import GenerateRequest, log_fields

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel
    from adapters.modulation.static_layers import StaticLayers

logger = logging.getLogger(__name__)

# How long a step waits for what a grammar allows, as a share of its forward where others have their
# tokens already, and where nobody has.
GRACE_SHARE = 0.02
GRACE_ALONE_S = 0.02
MIN_PREFILL_TOKENS = 16  # of a step, however many sequences are decoding


@dataclass(frozen=True, slots=True)
class Logits:
    """What comes out of one forward.

    Args:
        last: [n, vocabulary], of the last row of every part that predicts, in order.
        prompt: [m, vocabulary], of the rows before ``Part.scored`` of every part, in order.
    """

    last: torch.Tensor
    prompt: torch.Tensor


def whole_parts(running: Iterable[Sequence], budget_tokens: int) -> list[ScheduledRows]:
    """As ``next_parts``, but a prompt is always cut in the same places, whoever else reads.

    Pieces have ``budget_tokens`` tokens and are read whole or not at all: the oldest one in every
    case, others as far as the budget lasts.
    """
    sequences = list(running)
    parts = [ScheduledRows(sequence, 1) for sequence in sequences if not sequence.reading]
    budget = budget_tokens - len(parts)
    read = False
    for sequence in sequences:
        if sequence.reading:
            rows = min(sequence.pending, max(budget_tokens, MIN_PREFILL_TOKENS))
            if rows <= budget or not read:
                parts.append(ScheduledRows(sequence, rows))
                budget -= rows
                read = True
    return sorted(parts, key=lambda part: part.sequence.slot)


def next_parts(running: Iterable[Sequence], budget_tokens: int) -> list[ScheduledRows]:
    """Choose the rows of the next forward.

    Every decoding sequence takes one. The rest of the budget goes to prompts (and to sequences that
    are read anew), shared evenly between the adapters that have some, the oldest of each first.

    Returns:
        Parts in the order of their rows; those of one slot are neighbours.
    """
    sequences = list(running)
    parts = [ScheduledRows(sequence, 1) for sequence in sequences if not sequence.reading]
    budget = max(budget_tokens - len(parts), MIN_PREFILL_TOKENS)
    prompts: dict[str | None, list[Sequence]] = {}
    for sequence in sequences:
        if sequence.reading:
            prompts.setdefault(sequence.request.version, []).append(sequence)
    # The adapter with the least to read first: what it leaves is shared by the others.
    order = sorted(prompts.values(), key=lambda group: sum(s.pending for s in group))
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        share = -(-budget // left)
        for sequence in group:
            rows = min(sequence.pending, share)
            if rows > 0:
                parts.append(ScheduledRows(sequence, rows))
                share -= rows
                budget -= rows
    # Fewer segments make fewer and larger products.
    return sorted(parts, key=lambda part: part.sequence.slot)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of the parts of a step.

    Args:
        chosen: A token for every sequence that predicts and did not raise.
        broken: What the others raised.
        not_finite: Sequences whose prompt has a score that is not finite.
        deferred: Sequences for which it was not known what their grammar allows: no token was
            chosen, and their rows run again.
    """

    chosen: list[tuple[Sequence, Choice]]
    broken: list[tuple[Sequence, Exception]]
    not_finite: list[Sequence]
    deferred: list[Sequence] = field(default_factory=list)


def note_scores(parts: Items[ScheduledRows], logits: torch.Tensor) -> list[Sequence]:
    """Append to ``scores`` and ``likeliest`` of every sequence what the parts tell of its prompt.

    Args:
        parts: Those of the forward.
        logits: ``Logits.prompt`` of it, [m, vocabulary].

    Returns:
        Sequences with a score that is not finite, each once.
    """
    told = [(part.sequence, at) for part in parts for at in part.scored]
    broken: dict[str, Sequence] = {}
    scores = logprobs_of(logits, [sequence.ids[at] for sequence, at in told])
    wanted = [sequence.request.sampling.alternatives for sequence, _ in told]
    likeliest = likeliest_of(logits, wanted)
    for (sequence, _), score, others in zip(told, scores, likeliest, strict=True):
        sequence.scores.append(score)
        sequence.likeliest.append(others)
        if not isfinite(score):
            broken[sequence.request.id] = sequence
    return list(broken.values())


def _late(predicting: Items[Sequence], began: float) -> list[Sequence]:
    """Sequences for which it is not known yet what their grammar allows; of the others, what it is
    is handed to their choosers.

    Args:
        predicting: All that get a token of this step.
        began: The forward, as ``time.monotonic()`` counts.
    """
    held = [one for one in predicting if one.constraint is not None]
    if not held:
        return []
    now = time.monotonic()
    waiting = [one for one in held if one.constraint is not None and not one.constraint.ready]
    alone = len(waiting) == len(predicting)
    until = now + (GRACE_ALONE_S if alone else GRACE_SHARE * (now - began))
    late = []
    for one in held:
        constraint = one.constraint
        assert constraint is not None
        if not constraint.wait(until) or constraint.allowed().over:
            late.append(one)
        else:
            one.chooser.allowed = constraint.allowed().bits
    return late


_Attends = Callable[[KVCache, Items[Span]], PagedKeys]


class PagedForward:
    """Runs an adapted model over a flattened batch whose keys and values are in pages.

    Args:
        adapted: Its model must compute attention through transformers' attention interface.
        kv: Where room was reserved for every sequence that comes.
        deterministic: Sequences attend, and their tokens are chosen, one by one: no bit of an
            answer depends on the others.
        apart: Each part has a forward of its own.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        kv: KVCache,
        *,
        deterministic: bool = False,
        apart: bool = False,
    ) -> None:
        self._adapted = adapted
        model: Any = adapted.model
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._kv = kv
        self._device: torch.device = model.device
        self._keeps_logits = bool(model._supports_logits_to_keep())
        self._rope = RopeByLength(model)
        self.static: StaticStep | None = None  # None: every step runs as one with prompts in it
        self._static_layers: StaticLayers | None = None
        self._why_dynamic: str | None = None  # None: static steps were not asked for
        # How prompts attend without static steps, and how they attend now.
        self._gathered: _Attends = partial(PagedBatch, alone=True) if deterministic else PagedBatch
        self._batch: _Attends = self._gathered
        self._deterministic = deterministic
        self._apart = apart
        self.steps_by: Counter[str] = Counter()  # that were static, or why they were not
        self.steps = 0
        self.last_rows = 0
        self.last_adapters = 0  # the base not counted

    def __call__(self, parts: Items[ScheduledRows]) -> Logits:
        """Run the parts and write their keys and values to the cache.

        Returns:
            What comes out of the rows that are wanted; the others never reach the output layer.

        Raises:
            RuntimeError: the model does not use the attention interface in all its layers.
        """
        self._note(parts)
        return self._run(parts, self._batch)

    def _run(self, parts: Items[ScheduledRows], batch: _Attends) -> Logits:
        if not self._apart or len(parts) < 2:
            return self._logits(parts, batch)
        each = [self._logits([part], batch) for part in parts]
        return Logits(
            torch.cat([one.last for one in each]), torch.cat([one.prompt for one in each])
        )

    def _logits(self, parts: Items[ScheduledRows], batch: _Attends) -> Logits:
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []  # of the sequence that a row belongs to
        spans: list[Span] = []
        wanted: list[int] = []  # rows
        last: list[int] = []  # places in wanted
        scored: list[int] = []
        for part in parts:
            past = part.sequence.written
            spans.append(Span(part.sequence.request.id, len(ids), part.rows, past))
            ids += part.sequence.ids[past : past + part.rows]
            positions += range(past, past + part.rows)
            lengths += [len(part.sequence.ids)] * part.rows
            scored += range(len(wanted), len(wanted) + len(part.scored))
            wanted += range(len(ids) - part.rows, len(ids) - part.rows + len(part.scored))
            if part.predicts:
                last.append(len(wanted))
                wanted.append(len(ids) - 1)
        slots = segments.from_runs((part.sequence.slot, part.rows) for part in parts)
        kept = wanted or [len(ids) - 1]  # an output layer over no row at all is a case of its own
        keep = torch.tensor(kept, device=self._device)
        paged = batch(self._kv, spans)
        inputs: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        with (
            torch.inference_mode(),
            self._own_attention(),
            self._rope.sequences([lengths], self._device),
            self._adapted.batch(slots, logits=slots.take(kept) if self._keeps_logits else None),
        ):
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                paged=paged,
                **inputs,
            ).logits[0]
        check_all_attended(paged, self._model)
        if not self._keeps_logits:
            logits = logits[keep]
        if not scored:
            return Logits(logits[: len(last)], logits[:0])
        return Logits(logits[last], logits[scored])

    def make_static(
        self, slots: int, most: int, *, pool: GraphPool | None = None, spare_bytes: int = 0
    ) -> None:
        """Run decode steps over fixed buffers from now on; before any adapter is installed.

        What they need and do not get is said in the log, and no step is static.

        Args:
            slots: How many slots there will ever be, slot 0 included.
            most: Sequences of a step at most.
            pool, spare_bytes: As of ``StaticStep``.

        Raises:
            Exception: The device itself is lost.
        """
        if self._rope.kinds:
            self.leave_static("rope", "the rotary factors of this base depend on the length")
            return
        attention, batch = decode_in_torch, self._batch
        if self._kv.block_tokens % VARLEN_PAGE_TOKENS == 0:
            attention, batch = decode_by_varlen, VarlenBatch
        try:
            ranks = [rank for rank, _ in LAUNCH_CLASSES]
            self._static_layers = self._adapted.make_static(slots, most, ranks)
            self.static = StaticStep(
                self._model, self._static_layers, self._kv, most, attention,
                pool=pool, spare_bytes=spare_bytes,
            )  # fmt: skip
        except Exception as error:
            if is_lost(error):
                raise
            memory = isinstance(error, torch.OutOfMemoryError)
            self.leave_static("memory" if memory else "failed", f"{type(error).__name__}: {error}")
            return
        self._batch = batch

    def leave_static(self, reason: str, found: str) -> None:
        """Run no static step from now on, give back what they took, and count every step under
        ``reason``.

        Prompts attend as if static steps had never been asked for: what was wrong with these may be
        the attention that both have in common.
        """
        logger.warning("Decode steps stay dynamic: %s", " ".join(found.split())[:300])
        self.static = None
        if self._static_layers is not None:
            self._adapted.leave_static(self._static_layers, forms=True)
            self._static_layers = None
        self._batch = self._gathered
        self._why_dynamic = reason

    def capture_static(self) -> Iterator[tuple[int, int]]:
        """Capture the static steps where the device can; yields how many of how many are done.

        Raises:
            CannotCapture: The device cannot capture them.
        """
        if self.static is not None:
            with self._own_attention():
                yield from self.static.capture()

    def by_static(self, parts: Items[ScheduledRows]) -> list[Choice]:
        """A token for each part, by the static step."""
        assert self.static is not None
        with self._own_attention():
            return self.static(parts)

    def launch(self, sequences: Items[Sequence], after: LaunchedStep | None) -> LaunchedStep | None:
        """Launch a static step and wait for nothing; None: it cannot run so, or was not launched.

        Args:
            sequences: All decoding, those of one slot side by side.
            after: The step before, if what it chose is not taken in yet.

        Raises:
            Exception: The device itself is lost.
        """
        parts = [ScheduledRows(sequence, 1) for sequence in sequences]
        if self.static is None or self.static.obstacle(parts) is not None:
            return None
        try:
            launched = self.launch_static(sequences, after)
        except Exception as error:
            if is_lost(error):
                raise
            self.note_failure(self.static.key_of(sequences), error)
            return None
        self._note(parts)
        self.steps_by["static" if after is None else "ahead"] += 1
        return launched

    def note_failure(self, key: StepKey, error: Exception) -> None:
        """A static step has failed: one that does so time after time is not tried any more, unless
        what runs next finds a request at fault."""
        if self.static is not None:
            self.static.note_failure(self.static.captured.serving(key) or key, error)

    def launch_static(self, sequences: Items[Sequence], after: LaunchedStep | None) -> LaunchedStep:
        """As ``launch``, with nothing checked and nothing counted."""
        assert self.static is not None
        with self._own_attention():
            return self.static.launch(sequences, after)

    def in_every_bucket(self, parts: Items[ScheduledRows]) -> list[list[Choice]]:
        """The same static step in every bucket that can hold it."""
        assert self.static is not None
        with self._own_attention():
            return list(self.static.in_every_bucket(parts))

    def _choose(self, logits: torch.Tensor, sequences: Items[Sequence]) -> list[Choice]:
        choosers = [sequence.chooser for sequence in sequences]
        if not self._deterministic:
            return choose(logits, choosers)
        return [choose(row[None], [one])[0] for row, one in zip(logits, choosers, strict=True)]

    def dynamic(self, parts: Items[ScheduledRows]) -> torch.Tensor:
        """Logits of each part that predicts, as without static steps: ``[n, vocabulary]``.

        Nothing that static steps, or prompts beside them, attend by is in it.
        """
        return self._run(parts, self._gathered).last

    def chosen(self, parts: Items[ScheduledRows]) -> list[Choice]:
        """A token for each part, all of which predict, as a step with prompts in it chooses it."""
        return choose(self(parts).last, [part.sequence.chooser for part in parts])

    def rereads(self, tokens: int) -> bool:
        """Whether the keys of ``tokens`` tokens are others once there is one more."""
        return self._rope.changes(tokens, tokens + 1)

    def keys_of(self, tokens: int) -> int:
        """Sequences for which this differs have no keys in common, whatever their prefixes."""
        return self._rope.kind(tokens)

    def grows_anew(self, request: GenerateRequest) -> bool:
        """Whether the sequence will be read anew if all tokens asked for are generated."""
        return self._rope.changes(len(request.token_ids), request.tokens)

    def apart(self, parts: Items[ScheduledRows]) -> StepOutcome:
        """Run the parts, choose a token for each that predicts and note the scores of prompts; what
        raises is run apart, by adapter and then by halves, until only the sequences that are at
        fault have failed.

        Keys and values that a failed forward has written are written again, the same.

        Raises:
            Exception: The device itself is lost; nothing can run on it any more.
        """
        outcome = self._halved(parts)
        if self.static is not None:
            self.static.judge_failures(by_request=bool(outcome.broken))
        return outcome

    def _halved(self, parts: Items[ScheduledRows]) -> StepOutcome:
        """As ``apart``, with no failure of a static step judged."""
        predicting = [part.sequence for part in parts if part.predicts]
        chosen = self._static(parts)
        if chosen is not None:
            return StepOutcome(list(zip(predicting, chosen, strict=True)), [], [])
        began = time.monotonic()
        try:
            logits = self(parts)
            deferred = _late(predicting, began)
            last = logits.last
            if deferred:
                kept = [at for at, one in enumerate(predicting) if one not in deferred]
                predicting, last = [predicting[at] for at in kept], last[kept]
            choices = self._choose(last, predicting) if predicting else []
            not_finite = note_scores(parts, logits.prompt)
        except Exception as error:
            if is_lost(error):
                raise
            if len(parts) == 1:
                sequence = parts[0].sequence
                told = log_fields(sequence.request)
                logger.exception("A step of version %s failed", told["version"], extra=told)
                return StepOutcome([], [(sequence, error.with_traceback(None))], [])
            logger.warning("A generate step of %d sequences failed; they are run apart", len(parts))
        else:
            chosen_now = list(zip(predicting, choices, strict=True))
            return StepOutcome(chosen_now, [], not_finite, deferred)
        groups = [
            self._halved(group)
            for group in split_apart(parts, lambda one: one.sequence.request.version)
        ]
        return StepOutcome(
            [one for group in groups for one in group.chosen],
            [one for group in groups for one in group.broken],
            [one for group in groups for one in group.not_finite],
            [one for group in groups for one in group.deferred],
        )

    def _static(self, parts: Items[ScheduledRows]) -> list[Choice] | None:
        """A token for each part by the static step; None: it cannot, or has failed.

        What fails runs once more as a step with prompts does, which finds out who is at fault.

        Raises:
            Exception: The device itself is lost.
        """
        if self.static is None:
            if self._why_dynamic is not None:
                self.steps_by[self._why_dynamic] += 1
            return None
        reason = self.static.obstacle(parts)
        if reason is None:
            try:
                chosen = self.by_static(parts)
            except Exception as error:
                if is_lost(error):
                    raise
                self.note_failure(self.static.key_of([part.sequence for part in parts]), error)
                reason = "failed"
            else:
                self._note(parts)
                self.steps_by["static"] += 1
                return chosen
        self.steps_by[reason] += 1
        return None

    def _note(self, parts: Items[ScheduledRows]) -> None:
        slots = {part.sequence.slot for part in parts}
        self.steps += 1
        self.last_rows = sum(part.rows for part in parts)
        self.last_adapters = len(slots - {segments.BASE_SLOT})

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        before = self._config._attn_implementation
        self._config._attn_implementation = PAGED_ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before
