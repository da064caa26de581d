"""The lane for generation: many adapters and the bare base decoding together in one batch.

``step`` runs at most one forward: the next token of every running sequence and, within a budget of
tokens, pieces of prompts, flattened to one row per token; the adapted layers are told which rows
belong to which slot. Keys and values are in pages (``server.generation.kv_cache``), reserved for a
sequence's whole life when it is admitted, so want of room means waiting and never failure. Tokens
are chosen in ``server.generation.sampling``; what they come to is in
``server.generation.sequence_events``. One thread owns a lane.

With ``decode_steps = "ahead"`` a step is launched before what the one before it chose is taken
in: each row reads its token on the device; detokenizing, stop strings and streaming go on
meanwhile. What has ended in between has one row too many: its answer is dropped, and its pages and
its lease are held until that step is done.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from adapters import segments
from adapters.errors import SlotNotResident
from server import failures
from server.base.captured_steps import GraphPool
from server.base.memory import later_bytes
from server.failures import NotFinite, is_lost
from server.generation import failures as refusals
from server.generation.constraints import (
    Constraints,
    constraint_failure,
    wait_for_one,
)
from server.generation.fair_queue import FairQueue
from server.generation.figures import GenerateFigures
from server.generation.forward import (
    MIN_PREFILL_TOKENS,
    PagedForward,
    next_parts,
    whole_parts,
)
from server.generation.kv_cache import KVCache
from server.generation.page_attention import page_tokens_of
from server.generation.prefill import prefill_tokens_of
from server.generation.sampling import Choice
from server.generation.sequence_events import SequenceEvents, result_of
from server.generation.sequences import ScheduledRows, Sequence
from server.generation.static_start import start_static
from server.generation.static_step import LaunchedStep
from server.generation.step_pace import StepPace
from server.inputs.grammar_engine import Vocabulary
from server.inputs.token_bytes import token_bytes
from server.messages import (
    Event,
    Failure,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingOptions,
    log_fields,
)
from server.options import EngineOptions, runs_apart

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel
    from adapters.residency.slots import Residency

logger = logging.getLogger(__name__)

# An adapter that runs something already leaves this share of the sequences and of the KV blocks to
# adapters that run nothing: a flood on one never makes another wait for a whole answer to end.
SPARED_SHARE = 8
HELD_S = 0.002  # a step waits so long for a grammar where no sequence has anything else to do


class GenerateLane:
    """Generation over one adapted model.

    Every request that is submitted ends with exactly one terminal event, unless it is cancelled:
    then nobody waits and none is sent.

    Args:
        adapted: The base with its adapted layers. During a step its config names this lane's
            attention; between steps it is as it was.
        tokenizer: transformers' tokenizer of the base.
        residency: Brings adapters to the device and says in which slot they are.
        options: ``kv_bytes``, ``max_sequences``, ``prefill_tokens``, ``max_input_tokens``,
            ``grammar_bytes``, ``decode_steps`` and ``allow_prefix_sharing`` are read, and all
            budgets of the device.
        graphs: What captured steps have their memory in; None: a pool of their own.

    Raises:
        BaseModelError: ``kv_bytes`` does not hold a single block.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        tokenizer: Any,
        residency: Residency,
        options: EngineOptions,
        graphs: GraphPool | None = None,
    ) -> None:
        self._adapted = adapted
        self._residency = residency
        self._options = options
        model: Any = adapted.model
        self._context_tokens = adapted.signature.max_length
        text = model.config.get_text_config(decoder=True)
        self._prefill_tokens = prefill_tokens_of(options, text, model)
        self._kv = KVCache(
            text,
            budget_bytes=options.kv_bytes,
            max_sequences=options.max_sequences,
            context_tokens=self._context_tokens,
            dtype=model.dtype,
            device=model.device,
            share_prefixes=options.allow_prefix_sharing,
            step_tokens=max(self._prefill_tokens, MIN_PREFILL_TOKENS),
            page_tokens=page_tokens_of(text, model, options),
        )
        self._forward = PagedForward(
            adapted,
            self._kv,
            deterministic=options.deterministic,
            apart=runs_apart(options, model.device.type),
        )
        parts_of = whole_parts if options.deterministic else next_parts
        self._cut = partial(parts_of, budget_tokens=self._prefill_tokens)
        self._runs_ahead = options.decode_steps == "ahead"
        goal_ms = options.token_ms
        self._pace = None if goal_ms is None else StepPace(goal_ms / 1e3, self._cut)
        if options.decode_steps != "dynamic":
            self._forward.make_static(
                options.slots + 1,
                options.max_sequences,
                pool=graphs,
                spare_bytes=later_bytes(options, text, model.dtype, self._prefill_tokens),
            )
        vocabulary = Vocabulary(token_bytes(tokenizer, adapted.signature.vocab_size))
        self._constraints = Constraints(vocabulary, options.grammar_bytes)
        self._sequences = SequenceEvents(model, tokenizer, self._constraints)
        self._queue = FairQueue()
        self._running: dict[str, Sequence] = {}
        self._launched: LaunchedStep | None = None  # what it chose is not taken in
        # Ended while a launched step has a row of theirs; and whether their prefix is forgotten.
        self._leaving: list[tuple[Sequence, bool]] = []
        self._per_version: Counter[str | None] = Counter()
        self._deadlines: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self._outbox: list[Event] = []
        self._waits_s: list[float] = []
        self._counts: Counter[str] = Counter()

    def start_steps(self) -> None:
        """Try the static decode steps, and capture them on a CUDA device; the lane must be idle.

        Where they differ from the other steps, or cannot be captured, all steps stay dynamic: that
        is said once in the log, and counted. With ``decode_steps = "dynamic"`` nothing happens.

        Raises:
            Exception: The device itself is lost.
        """
        start_static(self._forward, self._adapted, self._kv, self._sequences.begin)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. What it can never be given is answered by the next step.

        Raises:
            ValueError: a request of this id is here already.
        """
        if request.id in self._queue or request.id in self._running:
            raise ValueError(f"A request with the id {request.id!r} is already here.")
        refusal = refusals.refusal(
            request,
            vocabulary=self._adapted.signature.vocab_size,
            max_input_tokens=self._options.max_input_tokens,
            context_tokens=self._context_tokens,
            capacity_tokens=self._kv.capacity_tokens,
        )
        if refusal is not None:
            self._outbox.append(refusal)
            return
        self._arrived[request.id] = request.submitted or time.monotonic()
        if request.deadline is not None:
            self._deadlines[request.id] = request.deadline
        self._queue.push(request)
        if request.version is not None:
            self._residency.prefetch(request.version)

    def cancel(self, request_id: str) -> bool:
        """Forget a request, waiting or running, and free what it holds; False if it is not here."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._leave(sequence)
            return True
        if self._queue.remove(request_id):
            self._forget(request_id)
            return True
        return False

    def has_work(self) -> bool:
        """Whether a step could do something now. Requests that wait for an adapter to load do not
        count until it is there, or until ``next_deadline``."""
        return bool(
            self._outbox
            or self._running
            or self._launched is not None
            or (self._deadlines and min(self._deadlines.values()) <= time.monotonic())
            or any(
                version is None or self._residency.state(version) != "loading"
                for version in self._queue.versions
            )
        )

    def next_deadline(self) -> float | None:
        """The earliest deadline of a request that is here, as ``time.monotonic()`` counts."""
        return min(self._deadlines.values(), default=None)

    @property
    def room_tokens(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return min(self._context_tokens, self._kv.capacity_tokens)

    def depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def take_waits_s(self) -> tuple[float, ...]:
        """How long requests waited from their submission until they were admitted to the steps, in
        seconds: of those that were admitted since this was last called."""
        taken, self._waits_s = tuple(self._waits_s), []
        return taken

    def versions(self) -> set[str]:
        """Versions of requests that wait or run."""
        known = {*self._queue.versions, *self._per_version}
        return {version for version in known if version is not None}

    def figures(self) -> GenerateFigures:
        return GenerateFigures(
            waiting=len(self._queue),
            running=len(self._running),
            kv_blocks_total=self._kv.blocks_total,
            kv_blocks_used=self._kv.blocks_used,
            kv_blocks_cached=self._kv.blocks_cached,
            steps=self._forward.steps,
            shared_tokens=self._counts["shared"],
            generated_tokens=self._counts["generated"],
            deferred_tokens=self._counts["deferred"],
            grammars_compiled=self._constraints.kept.compiled,
            grammar_bytes=self._constraints.kept.held_bytes,
            paced_steps={} if self._pace is None else self._pace.steps,
            steps_by=Counter(self._forward.steps_by),
            static_bytes={} if self._forward.static is None else self._forward.static.held_bytes(),
            last_rows=self._forward.last_rows,
            last_adapters=self._forward.last_adapters,
        )

    def step(self) -> list[Event]:
        """Expire, admit, run or launch one forward; returns what happened, in order."""
        events, self._outbox = self._outbox, []
        self._expire(events)
        self._end_constrained(events)
        self._admit(events)
        before = self._launched
        self._launched = self._launch_after(before)
        if before is not None:
            self._take_in(before, events)
        if self._launched is None:
            free = [one for one in self._running.values() if not one.held]
            parts = self._cut(free) if self._pace is None else self._pace.parts(free)
            held = [one.constraint for one in self._running.values() if one.constraint is not None]
            if parts:
                began = time.perf_counter()
                self._run(parts, events)
                if self._pace is not None:
                    self._pace.took(time.perf_counter() - began)
            elif held and not events:
                wait_for_one(held, HELD_S)
        return events

    def close(self) -> list[Event]:
        """End every request that is still here with a failure and free what they hold."""
        self._constraints.close()
        events, self._outbox = self._outbox, []
        self._launched = None
        self._let_go()
        ids = [*self._running, *(r.id for v in self._queue.versions for r in self._drop(v))]
        for request_id in ids:
            events.append(failures.stopping(request_id))
            self.cancel(request_id)
        return events

    # Before a forward

    def _expire(self, events: list[Event]) -> None:
        now = time.monotonic()
        for request_id in [i for i, deadline in self._deadlines.items() if deadline <= now]:
            place = "running" if request_id in self._running else "waiting"
            late = now - self._deadlines[request_id]
            self.cancel(request_id)
            events.append(failures.too_late(request_id, place, late))

    def _end_constrained(self, events: list[Event]) -> None:
        """End what its grammar has ended, completely or not."""
        for sequence in [one for one in self._running.values() if one.constraint is not None]:
            constraint = sequence.constraint
            if constraint is None or not constraint.ready:
                continue
            allowed = constraint.allowed()
            if allowed.fault is not None:
                self._leave(sequence, forget=True)
                events.append(constraint_failure(sequence.request.id, *allowed.fault))
            elif allowed.complete:
                events.append(self._result(sequence, "eos_token"))
            elif sequence.exhausted:
                events.append(self._result(sequence, "length"))

    def _admit(self, events: list[Event]) -> None:
        ready = {version: self._is_ready(version, events) for version in self._queue.versions}
        while len(self._running) < self._options.max_sequences:
            passed: list[GenerateRequest] = []
            for request in self._queue.heads():
                if not ready[request.version] or self._owes_room(request):
                    continue
                admitted = self._start(request)
                if admitted is None:
                    ready[request.version] = False
                elif admitted:
                    self._queue.take(request, passed)
                    break
                elif self._queue.is_impatient(request):
                    return
                else:
                    passed.append(request)
            else:
                return

    def _is_ready(self, version: str | None, events: list[Event]) -> bool:
        if version is None:
            return True
        state = self._residency.state(version)
        if state == "failed":
            error = self._residency.error(version)
            events += [failures.not_loaded(r, error) for r in self._drop(version)]
        elif state == "absent":
            self._residency.prefetch(version)
        return state == "ready"

    def _drop(self, version: str | None) -> list[GenerateRequest]:
        requests = self._queue.remove_version(version)
        for request in requests:
            self._forget(request.id)
        return requests

    def _owes_room(self, request: GenerateRequest) -> bool:
        """Whether the request would take what is spared for adapters that run nothing."""
        if not self._per_version[request.version]:
            return False
        most = self._options.max_sequences
        blocks = self._kv.blocks_for(request.tokens)
        spared = self._kv.blocks_total // SPARED_SHARE
        return (
            len(self._running) >= most - most // SPARED_SHARE
            or self._kv.blocks_free - blocks < spared
        )

    def _start(self, request: GenerateRequest) -> bool | None:
        """Admit a request: False when there is no room, None when its adapter is not there."""
        if any(one.request.id == request.id for one, _ in self._leaving):
            return False  # the pages under this name are not free yet
        own = (request.version, self._forward.keys_of(len(request.token_ids)))
        shared = self._kv.reserve(
            request.id,
            own,
            request.token_ids,
            request.kept_tokens,
            reuse=not request.sampling.prompt_logprobs,
            share=not self._forward.grows_anew(request),
        )
        if shared is None:
            return False
        slot = segments.BASE_SLOT
        if request.version is not None:
            try:
                slot = self._residency.lease([request.version])[request.version]
            except SlotNotResident:
                self._kv.release(request.id)
                self._residency.prefetch(request.version)
                return None
        sequence = self._sequences.begin(request, slot, shared)
        self._running[request.id] = sequence
        self._waits_s.append(max(0.0, sequence.admitted - self._arrived[request.id]))
        self._per_version[request.version] += 1
        self._counts["shared"] += shared
        return True

    # The forward and what follows

    def _run(self, parts: list[ScheduledRows], events: list[Event]) -> None:
        ran = self._forward.apart(parts)
        faults = [(one, failures.broken(one.request, error)) for one, error in ran.broken]
        faults += [(one, failures.not_finite(one.request)) for one in ran.not_finite]
        failed = {one.request.id for one, _ in faults}
        failed_or_late = failed | {one.request.id for one in ran.deferred}
        self._counts["deferred"] += len(ran.deferred)
        parts = [part for part in parts if part.sequence.request.id not in failed_or_late]
        done = [part.sequence for part in parts if part.completes and not part.predicts]
        for part in parts:
            self._note_written(part.sequence, part.rows)
        events += [self._result(one, "length") for one in done]
        for sequence, choice in ran.chosen:
            if sequence.request.id not in failed:
                self._take(sequence, choice, faults, events)
        self._constraints.start()
        events += self._settled(faults)

    def _launch_after(self, before: LaunchedStep | None) -> LaunchedStep | None:
        """The next decode step, launched from the tokens that ``before`` is choosing; None: there
        is none, or it needs what only the other path does.

        Sequences that ``before`` ends by their length are not in it.
        """
        if not self._runs_ahead:
            return None
        under_way = frozenset(() if before is None else before.sequences)
        sequences: list[Sequence] = []
        for one in sorted(self._running.values(), key=lambda one: one.slot):
            if one.reading:
                return None
            if len(one.tokens) + (one in under_way) < one.request.sampling.max_new_tokens:
                sequences.append(one)
        return self._forward.launch(sequences, before) if sequences else None

    def _take_in(self, step: LaunchedStep, events: list[Event]) -> None:
        """What a launched step chose, but for sequences that have ended since.

        Raises:
            Exception: The device itself is lost.
        """
        try:
            choices = step.choices()
        except Exception as error:
            if is_lost(error):
                raise
            # Nothing was taken in: the same tokens are chosen again, the other way.
            self._forward.note_failure(step.key, error)
            self._launched = None
            self._let_go()
            return
        faults: list[tuple[Sequence, Failure]] = []
        for sequence, choice in zip(step.sequences, choices, strict=True):
            if self._running.get(sequence.request.id) is sequence:
                self._note_written(sequence, 1)
                self._take(sequence, choice, faults, events)
        self._constraints.start()
        self._let_go()
        events += self._settled(faults)

    def _let_go(self) -> None:
        """Free what ended sequences hold, but for those that a launched step still writes for."""
        leaving, self._leaving = self._leaving, []
        for sequence, forget in leaving:
            self._free(sequence, forget=forget)

    def _note_written(self, sequence: Sequence, rows: int) -> None:
        known = sequence.generated if self._kv.shares_prefixes else ()
        self._kv.written(sequence.request.id, rows, known)
        sequence.written += rows

    def _take(
        self,
        sequence: Sequence,
        choice: Choice,
        faults: list[tuple[Sequence, Failure]],
        events: list[Event],
    ) -> None:
        """Take in a choice; what is wrong with it, or goes wrong, is added to ``faults``."""
        if not choice.finite:
            faults.append((sequence, failures.not_finite(sequence.request)))
            return
        if not choice.possible:
            self._leave(sequence)
            events.append(refusals.nothing_left(sequence.request))
            return
        try:
            events += self._advance(sequence, choice)
        except Exception as error:
            request = sequence.request
            logger.exception("Request %s failed", request.id, extra=log_fields(request))
            faults.append((sequence, failures.broken(sequence.request, error)))

    def _advance(self, sequence: Sequence, choice: Choice) -> list[Event]:
        """Take in a token; the events are the token's, if streamed, and the end, if it is one."""
        self._counts["generated"] += 1
        told, reason = self._sequences.advance(sequence, choice)
        if reason is not None:
            return [*told, self._result(sequence, reason)]
        if self._forward.rereads(len(sequence.ids) - 1):
            sequence.written = 0
            self._kv.rewind(sequence.request.id)
        return list(told)

    def _result(self, sequence: Sequence, reason: FinishReason) -> GenerateResult:
        made = result_of(sequence, reason, self._arrived[sequence.request.id])
        self._leave(sequence)
        return made

    def _settled(self, faults: list[tuple[Sequence, Failure]]) -> list[Event]:
        """End what has failed, as the adapter's fault only where the bare base does not fail, too.

        The base is tried once for each adapter, on the shortest of its texts, and when no step is
        under way: it needs the room of what has failed.
        """
        events: list[Event] = []
        for sequence, _ in faults:
            self._leave(sequence, forget=True)
        if faults and self._launched is not None:
            launched, self._launched = self._launched, None
            self._take_in(launched, events)
        shortest: dict[str | None, Sequence] = {}
        for sequence, _ in sorted(faults, key=lambda fault: -len(fault[0].ids)):
            shortest[sequence.request.version] = sequence
        found = {version: self._fault_of_base(one) for version, one in shortest.items()}
        events += [
            failure
            if (cause := found[sequence.request.version]) is None
            else failures.of_base(sequence.request.id, cause)
            for sequence, failure in faults
        ]
        return events

    def _fault_of_base(self, failed: Sequence) -> Exception | None:
        """What the bare base raises at the end of a text, as much of it as one step reads.

        Raises:
            Exception: The device itself is lost.
        """
        ids = failed.ids[-self._prefill_tokens :]
        request = GenerateRequest(
            f"{failed.request.id} on the base", None, None, tuple(ids), SamplingOptions(1)
        )
        reserved = self._kv.reserve(
            request.id, None, request.token_ids, len(ids), reuse=False, share=False
        )
        if reserved is None:
            return None  # others share what the failed text has left; nothing is known of the base
        bare = self._sequences.begin(request, segments.BASE_SLOT)
        try:
            ran = self._forward.apart([ScheduledRows(bare, len(ids))])
        finally:
            self._kv.release(request.id, forget=True)
        if ran.broken:
            return ran.broken[0][1]
        return None if all(choice.finite for _, choice in ran.chosen) else NotFinite()

    def _leave(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Free what a running sequence holds: its blocks, its lease and its place."""
        request = sequence.request
        if self._running.pop(request.id, None) is None:
            return
        if sequence.constraint is not None:
            sequence.constraint.close()
        self._per_version -= Counter({request.version: 1})
        self._forget(request.id)
        self._free(sequence, forget=forget)

    def _free(self, sequence: Sequence, *, forget: bool) -> None:
        """Free the pages and the lease of a sequence that has ended, once no step uses them."""
        if self._launched is not None and sequence in self._launched.sequences:
            self._leaving.append((sequence, forget))
            return
        self._kv.release(sequence.request.id, forget=forget)
        if sequence.request.version is not None:
            self._residency.release([sequence.request.version])

    def _forget(self, request_id: str) -> None:
        self._deadlines.pop(request_id, None)
        self._arrived.pop(request_id, None)
