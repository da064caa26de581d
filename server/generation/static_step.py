"""The decode step over fixed buffers: the same launches on the same memory, whoever is in it.

On a CPU it is an ordinary function. On a CUDA device the same function is captured once for each
bucket of rows (``server.base.captured_steps``) and replayed. What it cannot do, or what memory did
not let it capture, is named by ``obstacle``, and ``server.generation.forward`` then runs the step
as it runs prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from adapters.modulation.static_layers import StaticLayers
from adapters.modulation.static_rows import StaticRows
from server.base.captured_steps import (
    LAUNCH_CLASSES,
    UNCAPTURED,
    CapturedSteps,
    GraphPool,
    StepKey,
    launch_class,
)
from server.base.failed_steps import FailedSteps
from server.generation import step_sampling
from server.generation.attention import Call, check_all_attended
from server.generation.kv_cache import SLIDING_LAYERS, WRITE_PAGE, AttentionKind, KVCache
from server.generation.page_attention import DecodeAttention, Pages
from server.generation.sampling import Choice
from server.generation.step_buffers import HOST_TOKEN, RowNumbers, StepBuffers, ToldNumbers

if TYPE_CHECKING:
    from server.generation.sequences import ScheduledRows
    from server.generation.sequences import Sequence as Running

ROW_BUCKETS: Final = (1, 2, 4, 8)
BUCKET_ROWS: Final = 8  # apart, from there on


def buckets(most: int) -> tuple[int, ...]:
    """The row counts that steps are made for: 1, 2, 4, 8, 16, 24, ... and ``most``."""
    small = [rows for rows in ROW_BUCKETS if rows < most]
    return (*small, *range(2 * BUCKET_ROWS, most, BUCKET_ROWS), most)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was launched and perhaps is not done.

    Args:
        key: Of its launches.
        sequences: Of its rows, in order.
        told: What it tells.
        worked: Is told of the key once the answers are on the host.
    """

    key: StepKey
    sequences: tuple[Running, ...]
    told: ToldNumbers
    worked: Callable[[StepKey], None]

    def choices(self) -> list[Choice]:
        """What was chosen for each row, on the host: the only way back. Waits for the step."""
        ids, scores = self.told.read(len(self.sequences))
        choices: list[Choice] = []
        for one, row, values in zip(self.sequences, ids, scores, strict=True):
            options = one.request.sampling
            told = options.alternatives if options.logprobs else 0
            likeliest = tuple(zip(row[1 : 1 + told], values[1 : 1 + told], strict=True))
            logprob = values[0] if options.logprobs else None
            choices.append(Choice(row[0], logprob, bool(values[-1]), likeliest))
        self.worked(self.key)
        return choices


class StaticKeys:
    """Where the rows of a step write and read keys and values, from the buffers alone.

    Args:
        cache: The pages.
        buffers: Positions and tables of the rows.
        rows: Of the step.
        attention: What attends.
    """

    def __init__(
        self, cache: KVCache, buffers: StepBuffers, rows: int, attention: DecodeAttention
    ) -> None:
        self.cache = cache
        self.layers_run = 0
        self._attention = attention
        positions = buffers.positions(rows)
        self._lengths = (positions + 1).int()
        page = cache.block_tokens
        place = (positions // page)[:, None]
        inside = positions % page
        self._tables: dict[AttentionKind, torch.Tensor] = {}
        self._write: dict[AttentionKind, torch.Tensor] = {}
        self._fresh: dict[AttentionKind, torch.Tensor] = {}
        for kind in dict.fromkeys(cache.layer_kinds):
            table = buffers.table(kind, rows)
            own = table.gather(1, place).squeeze(1).long()
            self._tables[kind] = table
            self._write[kind] = own * page + inside
            # A page that is begun starts as zeros: see ``PagedBatch``.
            self._fresh[kind] = torch.where(inside == 0, own, WRITE_PAGE)

    def attend(self, layer: int, call: Call) -> None:
        """Write the new keys and values of a layer, and fill ``call.out``."""
        kind = self.cache.layer_kinds[layer]
        k_pages, v_pages = self.cache.pages_of(layer)
        for pages, new in ((k_pages, call.key), (v_pages, call.value)):
            pages.index_fill_(0, self._fresh[kind], 0)
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self._write[kind], new)
        window = self.cache.window if kind == SLIDING_LAYERS else None
        self._attention(call, Pages(k_pages, v_pages, self._tables[kind], self._lengths, window))
        self.layers_run += 1


class StaticStep:
    """Steps of one model in which every sequence takes one token.

    Args:
        model: transformers' model, with adapted layers that know ``layers``.
        layers: Its linear layers.
        cache: Where room was reserved for every sequence that comes.
        most: Rows of a step at most.
        attention: What attends to pages.
        pool: What graphs have their memory in; None: these have one of their own.
        spare_bytes: Of the device, which capturing must leave.
    """

    def __init__(
        self,
        model: Any,
        layers: StaticLayers,
        cache: KVCache,
        most: int,
        attention: DecodeAttention,
        *,
        pool: GraphPool | None = None,
        spare_bytes: int = 0,
    ) -> None:
        self._model = model
        self._layers = layers
        self._cache = cache
        self._attention = attention
        self._device: torch.device = model.device
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        vocabulary = getattr(model.get_output_embeddings(), "out_features", vocabulary)
        self.buffers = StepBuffers(most, cache, int(vocabulary), self._device)
        self.rows = StaticRows(most, self._device)
        self._buckets = buckets(most)
        # Seat, and how many tokens are noted there or will be by steps that were launched.
        self._seats: OrderedDict[Running, tuple[int, int]] = OrderedDict()
        self.captured = CapturedSteps(self._device, pool, spare_bytes)
        self._failed = FailedSteps("A static step")

    @property
    def most_rows(self) -> int:
        """Of a step, of those that were captured where any were."""
        return max((key.rows for key in self.captured), default=self.buffers.rows)

    def fixed(self) -> list[torch.Tensor]:
        """The memory that every step reads and writes."""
        layers = range(len(self._cache.layer_kinds))
        pages = [one for layer in layers for one in self._cache.pages_of(layer)]
        return [*self.buffers.all(), self.rows.slots, *pages]

    def held_bytes(self) -> dict[str, int]:
        """Bytes on the device, of buffers with tables and of graphs."""
        buffers = self.buffers.nbytes + self._layers.nbytes
        return {"buffers": buffers, "graphs": self.captured.nbytes}

    def obstacle(self, parts: Sequence[ScheduledRows]) -> str | None:
        """Why these parts cannot run as a static step, in one word for a metric; None: they can."""
        if len(parts) > self.buffers.rows:
            return "rows"
        for part in parts:
            sequence = part.sequence
            if part.rows != 1 or not part.predicts or not sequence.written:
                return "prefill"
            reason = self._layers.obstacle(sequence.slot)
            if reason is None:
                reason = step_sampling.option_obstacle(
                    sequence.request.sampling, len(sequence.tokens)
                )
            if reason is not None:
                return reason
        least = self.key_of([part.sequence for part in parts])
        key = self.captured.serving(least)
        if key is None:
            return UNCAPTURED
        return "failed" if self._failed.is_given_up(key) else None

    def note_failure(self, key: StepKey, error: Exception) -> None:
        """A step by these launches has failed: it may have noted its tokens or not."""
        self._failed.hold(key, error)
        self._seats.clear()

    def judge_failures(self, *, by_request: bool) -> None:
        """What failed has run the other way; ``by_request``: a request has failed there, too."""
        self._failed.judge(by_request=by_request)

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture every bucket, as ``CapturedSteps.capture_all`` does and raises."""
        keys = [
            StepKey(rows, rank, has_lora, plain)
            for rows in self._buckets
            for rank, has_lora in LAUNCH_CLASSES
            for plain in (True, False)
        ]
        self._fill([], None)
        yield from self.captured.capture_all(keys, self.run)

    def __call__(self, parts: Sequence[ScheduledRows]) -> list[Choice]:
        """Run the step, one token for each part; keys and values are written to the cache.

        Raises:
            RuntimeError: The model does not use the attention interface in all its layers.
        """
        return self.launch([part.sequence for part in parts], None).choices()

    def launch(self, sequences: Sequence[Running], after: LaunchedStep | None) -> LaunchedStep:
        """Launch a step and wait for nothing.

        Args:
            sequences: As ``obstacle`` allows them.
            after: The step before, if its choices are not taken in yet: sequences that it holds
                read from the device what it chose for them, one position further.

        Raises:
            RuntimeError: The model does not use the attention interface in all its layers.
        """
        self._fill(sequences, after)
        key = self.key_of(sequences)
        return self._launched(self.captured.serving(key) or key, sequences)

    def in_every_bucket(self, parts: Sequence[ScheduledRows]) -> Iterator[list[Choice]]:
        """The same step in each bucket, and for each class of launches, that can hold the parts.

        Keys and values are written again each time, the same.
        """
        sequences = [part.sequence for part in parts]
        least = self.key_of(sequences)
        for key in list(self.captured) or [least]:
            if key.holds(least):
                self._fill(sequences, None)
                yield self._launched(key, sequences).choices()

    @torch.inference_mode()
    def chosen_of(self, logits: torch.Tensor, sequences: Sequence[Running]) -> list[Choice]:
        """What a step would choose if it computed these logits ``[n, vocabulary]``; none is run,
        and nothing is written but the step's buffers."""
        self._fill(sequences, None)
        rows = len(sequences)
        self.buffers.seen[self.buffers.seats(rows), self.buffers.read_ids(rows)] = True
        step_sampling.choose_all(logits, self.buffers)
        key = self.key_of(sequences)
        return self._telling(key, sequences).choices()

    def _launched(self, key: StepKey, sequences: Sequence[Running]) -> LaunchedStep:
        if not self.captured.replay(key):
            self.run(key)
        return self._telling(key, sequences)

    def _telling(self, key: StepKey, sequences: Sequence[Running]) -> LaunchedStep:
        return LaunchedStep(key, tuple(sequences), self.buffers.told(), self._failed.worked)

    def key_of(self, sequences: Sequence[Running]) -> StepKey:
        """What these sequences need of a step."""
        slots = dict.fromkeys(one.slot for one in sequences)
        rank = max((self._layers.rank(slot) for slot in slots), default=0)
        has_lora = any(self._layers.has_lora(slot) for slot in slots)
        rows = next(one for one in self._buckets if one >= len(sequences))
        plain = all(step_sampling.takes_best(one.request.sampling) for one in sequences)
        return StepKey(rows, *launch_class(rank, has_lora), plain)

    def _fill(self, sequences: Sequence[Running], after: LaunchedStep | None) -> None:
        """Write what the step reads: the only way from the host to it."""
        kinds = tuple(dict.fromkeys(self._cache.layer_kinds))
        rows = {} if after is None else {one: row for row, one in enumerate(after.sequences)}
        numbers: list[RowNumbers] = []
        for one in sequences:
            options, chooser = one.request.sampling, one.chooser
            source = rows.get(one, HOST_TOKEN)
            ahead = int(source != HOST_TOKEN)
            name, position = one.request.id, one.written + ahead
            seat = self._seat(one, ahead) if chooser.penalized else self.buffers.spare_seat
            numbers.append(
                RowNumbers(
                    token_id=0 if ahead else one.ids[position],
                    position=position,
                    seat=seat,
                    tables={k: self._cache.table(name, k, position + 1) for k in kinds},
                    temperature=options.temperature if chooser.sampled else 1.0,
                    top_k=min(options.top_k, self.buffers.vocabulary),
                    top_p=options.top_p,
                    min_p=options.min_p,
                    penalty=options.repetition_penalty,
                    sampled=chooser.sampled,
                    point=chooser.draw(ahead) if chooser.sampled else 0.0,
                    source=source,
                )
            )
        self.buffers.fill(numbers)
        self.rows.fill([one.slot for one in sequences])

    def _seat(self, sequence: Running, ahead: int) -> int:
        """Where the tokens of a sequence are noted; those that no step has noted are noted now.

        The step itself notes the token that it reads: it is taken by then, so a step that runs
        again notes nothing that was not.

        Args:
            sequence: With a repetition penalty.
            ahead: Tokens that are chosen and that the host has not taken in.
        """
        history = sequence.chooser.history
        known = len(history) + ahead
        found = self._seats.pop(sequence, None)
        if found is None:
            seat = len(self._seats)
            if seat >= self.buffers.rows:
                _, (seat, _) = self._seats.popitem(last=False)  # the longest without a step
            self.buffers.seen[seat] = False
            found = (seat, 0)
        seat, noted = found
        missing = history[noted : known - 1]
        if len(missing):
            self.buffers.seen[seat, missing.to(self._device)] = True
        self._seats[sequence] = (seat, known)
        return seat

    @torch.inference_mode()
    def run(self, key: StepKey) -> None:
        """The step itself: reads buffers, writes buffers, and looks at nothing."""
        buffers, rows = self.buffers, key.rows
        self.rows.shape(rows, key.rank, key.has_lora)
        ids = buffers.read_ids(rows)
        if not key.plain:
            buffers.seen[buffers.seats(rows), ids] = True
        keys = StaticKeys(self._cache, buffers, rows, self._attention)
        with self._layers_static():
            logits: torch.Tensor = self._model(
                input_ids=ids[None],
                position_ids=buffers.positions(rows)[None],
                use_cache=False,
                paged=keys,
            ).logits[0]
        check_all_attended(keys, self._model)
        if key.plain:
            step_sampling.choose_best(logits, buffers)
        else:
            step_sampling.choose_all(logits, buffers)

    @contextmanager
    def _layers_static(self) -> Iterator[None]:
        self._layers.rows = self.rows
        try:
            yield
        finally:
            self._layers.rows = None
