"""The lane for what is read at once: classes of texts and images, tokens, answers, masks, vectors.

Each input of a request is a row. ``step`` takes one batch of rows of similar length from the
scheduler, whatever their adapters and tasks, runs the backbone once, gives each adapter's rows to
its own head and answers the requests whose rows are all done. A fault in one adapter fails only
what was asked of that adapter. One thread owns a lane.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from adapters import segments
from adapters.tasks import Task
from server import failures
from server.base.captured_steps import GraphPool
from server.base.load import LoadedBase
from server.base.memory import later_bytes
from server.base.rope import RopeByLength
from server.encoding.batch import Rows
from server.encoding.fair_batches import AdapterVersion, Batch, Row, Scheduler
from server.encoding.read import BatchStates, Reader, RowGroup
from server.encoding.unpadded import (
    UnpaddedForward,
    probe_texts,
    static_fault,
    unpadded_obstacle,
)
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import EncodeRequest, EncodeResult, Event
from server.options import EngineOptions, runs_apart
from server.stages import tell_stage

if TYPE_CHECKING:
    from adapters.residency.slots import Residency

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodeFigures:
    """How the lane stands; counters count since it was made."""

    steps: int = 0
    last_rows: int = 0  # of the latest batch
    last_adapters: int = 0  # distinct adapters in it, the base not counted
    last_seconds: float = 0.0  # that it took
    head_bytes: int = 0
    steps_by: Mapping[str, int] = field(default_factory=dict)  # unpadded, or why they were not
    static_bytes: Mapping[str, int] = field(default_factory=dict)  # on the device: buffers, graphs


@dataclass(slots=True)
class _Pending:
    """A request of which not all rows are done."""

    request: EncodeRequest
    arrived: float
    outputs: dict[int, Any] = field(default_factory=dict)
    began: float | None = None
    compute_s: float = 0.0


class EncodeLane:
    """Encoding over one adapted model.

    Every request that is submitted ends with exactly one terminal event, unless it is cancelled:
    then nobody waits and none is sent.

    Args:
        base: The loaded base.
        inputs: Its tokenizer, or its image processor, and their limits.
        residency: Brings adapters to the device and says in which slot they are.
        options: ``max_batch_tokens``, ``max_batch_rows``, ``slots``, ``head_bytes``,
            ``deterministic`` and ``encode_batches`` are read, and for what graphs must leave of the
            device its budgets, ``max_sequences`` and ``prefill_tokens``.
        graphs: What captured batches have their memory in; None: a pool of their own.
    """

    def __init__(
        self,
        base: LoadedBase,
        inputs: Text | Images,
        residency: Residency,
        options: EngineOptions,
        graphs: GraphPool | None = None,
    ) -> None:
        self._base = base
        self._inputs = inputs
        self._residency = residency
        self._scheduler = Scheduler(options.max_batch_tokens, options.max_batch_rows)
        self._reader = Reader(
            base,
            inputs,
            heads_kept=options.slots,
            head_bytes=options.head_bytes,
            alone=options.deterministic,
        )
        self._pending: dict[str, _Pending] = {}
        self._outbox: list[Event] = []
        self._rows = Rows(base, inputs)
        self._rope = RopeByLength(base.model)
        self._deterministic = options.deterministic
        self._apart = runs_apart(options, base.device.type)
        self._options = options
        self._graphs = graphs
        self._unpadded: UnpaddedForward | None = None
        self._how = "padded"  # a batch runs: ``unpadded``, or why not
        self._steps_by: Counter[str] = Counter()
        self._figures = EncodeFigures()
        self._waits_s: list[float] = []

    def start(self) -> None:
        """Run texts without padding from now on, if that gives what padded ones give.

        The lane must be idle, and no adapter installed. Where it cannot, batches are padded: that
        is said once in the log, and counted.

        Raises:
            Exception: The device itself is lost.
        """
        if isinstance(self._inputs, Images):
            self._how = "images"  # all of one size: they never have padding
            return
        if self._deterministic:
            self._how = "deterministic"  # texts of one length run together: no padding, either
            return
        try:
            unpadded = UnpaddedForward(self._base, self._rows, self._rope)
            found = unpadded_obstacle(self._base, unpadded, self._padded_states)
        except Exception as error:
            if failures.is_lost(error):
                raise
            found = "failed", f"{type(error).__name__}: {error}"
        if found is None:
            self._unpadded, self._how = unpadded, "unpadded"
            if self._options.encode_batches == "static":
                self._run_over_fixed_buffers(unpadded)
        else:
            self._how, why = found
            logger.info("Texts are encoded with padding: %s", " ".join(why.split())[:300])
        if self._base.device.type == "cuda":
            self._read_together()

    def _run_over_fixed_buffers(self, unpadded: UnpaddedForward) -> None:
        """Run batches so from now on, captured on a CUDA device, if they are what padded ones are.

        Raises:
            Exception: The device itself is lost.
        """
        options = self._options
        text = self._base.backbone.config.get_text_config()
        prompts = (options.prefill_tokens or 0) if self._base.generates else 0
        try:
            fault = unpadded.make_static(
                options.slots + 1,
                options.max_batch_tokens,
                options.max_batch_rows,
                pool=self._graphs,
                spare_bytes=later_bytes(options, text, self._base.dtype, prompts),
            )
            if fault is None:
                # Before anything is captured, and then what was captured.
                fault = self._static_fault(unpadded)
                assert unpadded.static is not None
                if fault is not None and unpadded.static.leave_pooler_out():
                    # A pooler that reads more than the first token of a text.
                    fault = self._static_fault(unpadded)
            if fault is None:
                for done, every in unpadded.capture_static():
                    tell_stage("capturing batches of texts", done, every)
                assert unpadded.static is not None
                if unpadded.static.is_for_nothing:
                    fault = "memory ended before any was captured"
                elif unpadded.static.is_captured:
                    fault = static_fault(self._base, unpadded, self._padded_states)
        except Exception as error:
            if failures.is_lost(error):
                raise
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            unpadded.leave_static()
            logger.warning("No batch of texts is static: %s", " ".join(fault.split())[:300])
            return
        assert unpadded.static is not None
        self._figures = replace(self._figures, static_bytes=unpadded.static.held_bytes())

    def _static_fault(self, unpadded: UnpaddedForward) -> str | None:
        """What is wrong with batches over fixed buffers, or what they raise; None: nothing.

        Raises:
            Exception: The device itself is lost.
        """
        try:
            return static_fault(self._base, unpadded, self._padded_states)
        except Exception as error:
            if failures.is_lost(error):
                raise
            return f"{type(error).__name__}: {error}"

    def _read_together(self) -> None:
        """Bring all answers of a batch back in one copy, if they are then the same.

        Raises:
            Exception: The device itself is lost.
        """
        try:
            with torch.inference_mode():
                items = probe_texts(self._base)
                states = self._states(items, [segments.BASE_SLOT] * len(items))
                error = self._reader.compare_together(states)
        except Exception as cause:
            if failures.is_lost(cause):
                raise
            logger.warning("Answers come back one by one: %s: %s", type(cause).__name__, cause)
            return
        if not self._reader.is_together:
            logger.warning("Answers come back one by one: together they differ by %.1e", error)

    def submit(self, request: EncodeRequest) -> None:
        """Queue a request. What it can never be given is answered by the next step.

        Raises:
            ValueError: A request of this id is here already.
        """
        if request.id in self._pending:
            raise ValueError(f"A request with the id {request.id!r} is already here.")
        refusal = failures.refusal(request, self._inputs)
        if refusal is not None:
            self._outbox.append(refusal)
            return
        lengths = [item.tokens for item in request.inputs]
        self._pending[request.id] = _Pending(request, request.submitted or time.monotonic())
        self._scheduler.submit(request.id, request.version, lengths, request.deadline)
        if request.version is not None:
            self._residency.prefetch(request.version)

    def cancel(self, request_id: str) -> bool:
        """Forget a request; False if it is not here."""
        self._scheduler.cancel(request_id)
        return self._pending.pop(request_id, None) is not None

    def has_work(self) -> bool:
        """Whether a step could do something now. Requests that wait for an adapter to load do not
        count until it is there, or until ``next_deadline``."""
        deadline = self._scheduler.next_deadline()
        return bool(
            self._outbox
            or (deadline is not None and deadline <= time.monotonic())
            or any(
                key is None or self._residency.state(key) != "loading"
                for key in self._scheduler.waiting()
            )
        )

    def next_deadline(self) -> float | None:
        """The earliest deadline of a request that is here, as ``time.monotonic()`` counts."""
        return self._scheduler.next_deadline()

    def depth(self) -> int:
        """Requests that wait."""
        return len(self._pending)

    def figures(self) -> EncodeFigures:
        return self._figures

    def take_waits_s(self) -> tuple[float, ...]:
        """How long requests waited from their submission until their first step, in seconds: of
        those that have begun since this was last called."""
        taken, self._waits_s = tuple(self._waits_s), []
        return taken

    def versions(self) -> set[str]:
        """Versions that requests wait for."""
        return {key for key in self._scheduler.waiting() if key is not None}

    def headed(self) -> set[str]:
        """Versions whose head is kept."""
        return self._reader.headed()

    def forget_head(self, version: str) -> None:
        self._reader.forget(version)
        self._figures = replace(self._figures, head_bytes=self._reader.head_bytes)

    def step(self) -> list[Event]:
        """Expire, fail what cannot be loaded, run one batch; returns what happened, in order."""
        events, self._outbox = self._outbox, []
        self._expire(events)
        self._drop_failed(events)
        batch, slots = self._next_batch()
        if batch is not None:
            try:
                self._run(batch, slots, events)
            finally:
                self._residency.release([key for key in batch.keys if key is not None])
        return events

    def close(self) -> list[Event]:
        """End every request that is still here with a failure."""
        events, self._outbox = self._outbox, []
        for request_id in list(self._pending):
            self.cancel(request_id)
            events.append(failures.stopping(request_id))
        return events

    # Before a forward

    def _expire(self, events: list[Event]) -> None:
        now = time.monotonic()
        for request_id in self._scheduler.expire(now):
            pending = self._pending.pop(request_id)
            late_s = now - (pending.request.deadline or now)
            events.append(failures.too_late(request_id, "waiting", late_s))

    def _drop_failed(self, events: list[Event]) -> None:
        for key in self._scheduler.waiting():
            if key is None or self._residency.state(key) != "failed":
                continue
            error = self._residency.error(key)
            for request_id in self._scheduler.drop(key):
                events.append(failures.not_loaded(self._pending.pop(request_id).request, error))

    def _next_batch(self) -> tuple[Batch | None, dict[AdapterVersion, int]]:
        """A batch whose adapters are held in their slots until they are released."""
        waiting = [key for key in self._scheduler.waiting() if key is not None]
        held = self._residency.hold(waiting)  # while the batch is made, none of them leaves
        for key in waiting:
            if key not in held and self._residency.state(key) == "absent":
                self._residency.prefetch(key)
        slots: dict[AdapterVersion, int] = {None: segments.BASE_SLOT}
        slots.update(held)
        batch = self._scheduler.next_batch(slots.__contains__)
        chosen = [key for key in batch.keys if key is not None] if batch is not None else []
        self._residency.use(chosen)
        self._residency.release(held.keys() - chosen)
        return batch, slots

    # The forward and what follows

    def _run(self, batch: Batch, slots: dict[AdapterVersion, int], events: list[Event]) -> None:
        began = time.monotonic()
        clock = time.perf_counter()
        outputs = self._forward(batch.rows, slots)
        seconds = time.perf_counter() - clock
        self._steps_by[self._how if self._unpadded is None else self._unpadded.ran] += 1
        self._figures = replace(
            self._figures,
            steps=self._figures.steps + 1,
            last_rows=len(batch.rows),
            last_adapters=sum(key is not None for key in batch.keys),
            last_seconds=seconds,
            head_bytes=self._reader.head_bytes,
            steps_by=Counter(self._steps_by),
        )
        for request_id in dict.fromkeys(row.request for row in batch.rows):
            pending = self._pending[request_id]
            if pending.began is None:
                pending.began = began
                self._waits_s.append(max(0.0, began - pending.arrived))
            pending.compute_s += seconds
        causes = self._causes(batch.rows, outputs)
        for row, output in zip(batch.rows, outputs, strict=True):
            self._settle(row, output, causes, events)

    def _causes(self, rows: Sequence[Row], outputs: Sequence[Any]) -> dict[str, Exception]:
        """Requests that failed as they would have on the bare base, with what it raised."""
        failed: dict[str, Row] = {}
        for row, output in zip(rows, outputs, strict=True):
            if isinstance(output, Exception) and not failures.is_told(output):
                failed.setdefault(row.request, row)
        found = self._faults_of_base(list(failed.values()))
        return {
            request: error
            for request, error in zip(failed, found, strict=True)
            if error is not None
        }

    def _settle(
        self, row: Row, output: Any, causes: dict[str, Exception], events: list[Event]
    ) -> None:
        pending = self._pending.get(row.request)
        if pending is None:
            return  # another row of the request has failed it
        request = pending.request
        if isinstance(output, Exception):
            self.cancel(request.id)
            cause = causes.get(request.id)
            events.append(
                failures.broken(request, output)
                if cause is None
                else failures.of_base(request.id, cause)
            )
            return
        pending.outputs[row.index] = output
        if len(pending.outputs) < len(request.inputs):
            return
        del self._pending[request.id]
        assert pending.began is not None
        events.append(
            EncodeResult(
                id=request.id,
                outputs=tuple(pending.outputs[index] for index in range(len(request.inputs))),
                version=request.version,
                prompt_tokens=request.tokens,
                queue_ms=max(0.0, pending.began - pending.arrived) * 1000,
                compute_ms=pending.compute_s * 1000,
            )
        )

    def _forward(self, rows: Sequence[Row], slots: dict[AdapterVersion, int]) -> list[Any]:
        """An output, or the exception that took its place, for each row: what raises is run apart,
        by adapter and then by halves, until only the rows that are at fault have failed."""
        if self._deterministic:
            kinds = [item.tokens for item in self._asked(rows)[0]]
            if self._apart:
                kinds = list(range(len(rows)))
            if len(set(kinds)) > 1:
                # No padding, and so no shape but a text's own.
                outputs: list[Any] = [None] * len(rows)
                for kind in dict.fromkeys(kinds):
                    places = [place for place, one in enumerate(kinds) if one == kind]
                    found = self._forward([rows[place] for place in places], slots)
                    for place, output in zip(places, found, strict=True):
                        outputs[place] = output
                return outputs
        try:
            with torch.inference_mode():
                return self._answer(rows, slots)
        except Exception as error:
            if failures.is_lost(error):
                raise
            if len(rows) == 1:
                version = rows[0].key
                logger.exception(
                    "Encoding a row of version %s failed", version, extra={"version": version}
                )
                return [error.with_traceback(None)]
            logger.warning("An encode step of %d rows failed; they are run apart", len(rows))
        parts = failures.split_apart(rows, lambda row: row.key)
        return [output for part in parts for output in self._forward(part, slots)]

    def _faults_of_base(self, rows: Sequence[Row]) -> list[Exception | None]:
        """What the bare base does with each row: raises, answers what is not finite, or None.

        Raises:
            Exception: The device itself is lost.
        """
        if not rows:
            return []
        items, tasks = self._asked(rows)
        try:
            with torch.inference_mode():
                states = self._states(items, [segments.BASE_SLOT] * len(rows))
                return [
                    self._reader.fault_of_base(task, *one)
                    for task, *one in zip(
                        tasks, states.hidden, states.ids, states.mask, strict=True
                    )
                ]
        except Exception as error:
            if failures.is_lost(error):
                raise
            if len(rows) == 1:
                return [error.with_traceback(None)]
        halves = failures.split_apart(rows, lambda _: None)
        return [fault for half in halves for fault in self._faults_of_base(half)]

    def _asked(self, rows: Sequence[Row]) -> tuple[list[Any], list[Task]]:
        """The input and the task of each row."""
        requests = [self._pending[row.request].request for row in rows]
        items = [one.inputs[row.index] for one, row in zip(requests, rows, strict=True)]
        return items, [one.task for one in requests]

    def _states(self, items: Sequence[Any], slots: Sequence[int]) -> BatchStates:
        """What the backbone makes of some inputs, each in its slot."""
        return (self._unpadded or self._padded_states)(items, slots)

    def _padded_states(self, items: Sequence[Any], slots: Sequence[int]) -> BatchStates:
        feed = self._rows.feed(items)
        sequences = segments.from_rows(slots)
        with (
            self._base.adapted.batch(sequences.repeat(feed.tokens), sequences),
            self._rope.sequences([[item.tokens] for item in items], self._base.device),
        ):
            out = self._base.backbone(**feed.arguments)
        ids, mask = feed.tables(out.last_hidden_state)
        return BatchStates(out.last_hidden_state, getattr(out, "pooler_output", None), ids, mask)

    def _answer(self, rows: Sequence[Row], slots: dict[AdapterVersion, int]) -> list[Any]:
        items, tasks = self._asked(rows)
        states = self._states(items, [slots[row.key] for row in rows])
        groups: dict[tuple[AdapterVersion, Task, int], list[int]] = {}
        for index, (row, task) in enumerate(zip(rows, tasks, strict=True)):
            # A head's products are its own: row by row they do not depend on others.
            alone = index if self._deterministic else 0
            groups.setdefault((row.key, task, alone), []).append(index)
        asked = [
            (
                RowGroup(
                    version=key,
                    task=task,
                    slot=slots[key],
                    requests=[self._pending[rows[index].request].request for index in indices],
                    items=[items[index] for index in indices],
                    rows=indices,
                    states=states,
                ),
                None if key is None else self._residency.weights(key),
            )
            for (key, task, _), indices in groups.items()
        ]
        outputs: list[Any] = [None] * len(rows)
        found = self._reader.read_all(asked)
        for indices, answers in zip(groups.values(), found, strict=True):
            for index, answer in zip(indices, answers, strict=True):
                outputs[index] = answer
        return outputs
