"""A batch of texts over fixed buffers: the same launches on the same memory, whoever is in it.

On a CPU it is an ordinary function. On a CUDA device the same function is captured once for each
bucket of tokens (``server.base.captured_steps``) and replayed. Rows beyond the tokens of a batch
are texts of nobody, which attend to themselves. What cannot be computed so (an adapter of an
embedding, more tokens than there is room for, a bucket that memory did not let it capture) is named
by ``obstacle``, and the batch then runs as ``server.encoding.unpadded`` runs it. A pooler is in it,
over the first row of each text; heads are not: which there are is known when adapters come, and
nothing is captured then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch.nn import functional as F

from adapters.modulation.static_layers import StaticLayers
from adapters.modulation.static_rows import StaticRows, StaticTokens
from server.base.captured_steps import (
    LAUNCH_CLASSES,
    UNCAPTURED,
    CapturedSteps,
    GraphPool,
    StepKey,
    launch_class,
)
from server.base.failed_steps import FailedSteps
from server.base.load import LoadedBase
from server.encoding.batch import FlatFeed
from server.encoding.text_bounds import Attend, TextBounds

FIRST_BUCKET_TOKENS: Final = 16
_HOST_COPIES: Final = 2  # copies on the host: one may be under way while the next one is written


def token_buckets(most: int) -> tuple[int, ...]:
    """The token counts that batches are made for: 16, 32, 64, ... and ``most``."""
    found = [FIRST_BUCKET_TOKENS]
    while found[-1] < most:
        found.append(2 * found[-1])
    return (*(one for one in found if one < most), most)


class StaticTexts(TextBounds):
    """Where the texts of a static batch begin, in a buffer; what its attention layers are given.

    Args:
        starts: int32 ``[texts + 1]``: the first row of each; where there are fewer texts, the end.
        longest: Tokens that a text can have.
        attend: What attends.
    """

    def __init__(self, starts: torch.Tensor, longest: int, attend: Attend) -> None:
        super().__init__((longest,), starts, attend)


def attend_under_mask(  # noqa: PLR0917  # as ``Attend``, which has no names
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: TextBounds,
    scale: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """All rows against all under a mask: for static batches, on any device, in memory N².

    Numbers that are not finite reach every row of their own text and no other: a mask alone would
    multiply them by 0, which is not finite either.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (
            one[:, :, None].expand(-1, -1, shared, -1).reshape(one.shape[0], -1, one.shape[-1])
            for one in (key, value)
        )
    rows = torch.arange(query.shape[0], device=query.device, dtype=torch.int32)
    owner = torch.searchsorted(texts.starts, rows, right=True)
    sees = owner[:, None] == owner
    distance = rows[:, None] - rows
    if window is not None:
        sees = sees & (distance.abs() < window)
    if causal:
        sees = sees & (distance >= 0)
    bad = ~(torch.isfinite(key) & torch.isfinite(value)).flatten(1).all(1)
    key, value = (one.masked_fill(bad[:, None, None], 0) for one in (key, value))
    q, k, v = (one.transpose(0, 1)[None] for one in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)
    reached = (sees & bad).any(1)
    return attended[0].transpose(0, 1).masked_fill(reached[:, None, None], float("nan"))


class StaticBatch:
    """Batches of one base over fixed buffers.

    Args:
        base: Its backbone takes texts without padding.
        layers: Its linear layers.
        most_tokens, most_texts: Of a batch.
        attend: What attends in it, given ``StaticTexts``.
        own_attention: Lets the base attend through ``server.encoding.unpadded``.
        pool: What graphs have their memory in; None: these have one of their own.
        spare_bytes: Of the device, which capturing must leave.
    """

    def __init__(
        self,
        base: LoadedBase,
        layers: StaticLayers,
        most_tokens: int,
        most_texts: int,
        *,
        attend: Attend = attend_under_mask,
        own_attention: Callable[[], AbstractContextManager[None]],
        pool: GraphPool | None = None,
        spare_bytes: int = 0,
    ) -> None:
        device = base.device
        self._base = base
        self._layers = layers
        self._longest = max(1, min(most_tokens, base.adapted.signature.max_length))
        self._attend = attend
        self._own_attention = own_attention
        self._buckets = token_buckets(most_tokens)
        self._most_texts = most_texts
        # Texts of nobody are no longer than others: their number is bounded, too.
        texts = most_texts + -(-most_tokens // self._longest)
        self._tokens = torch.zeros(3, most_tokens, dtype=torch.int64, device=device)
        self._starts = torch.zeros(texts + 1, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = [
            torch.zeros(texts + 1, dtype=torch.int32, pin_memory=pinned)
            for _ in range(_HOST_COPIES)
        ]
        width = int(base.backbone.config.get_text_config().hidden_size)
        self._out = torch.zeros(most_tokens, width, dtype=base.dtype, device=device)
        self._token_rows = StaticTokens(most_tokens, most_texts + 1, device)
        self._text_rows = StaticRows(most_texts, device)
        self._pooled = torch.zeros(most_texts, width, dtype=base.dtype, device=device)
        self._pools = getattr(base.backbone, "pooler", None) is not None
        embeddings = getattr(base.backbone, "embeddings", None)
        self._has_types = getattr(embeddings, "token_type_embeddings", None) is not None
        known = inspect.signature(base.backbone.forward).parameters
        self._constant: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
        self._captured = CapturedSteps(device, pool, spare_bytes)
        self._failed = FailedSteps("A static batch of texts")

    def fixed(self) -> list[torch.Tensor]:
        """The memory that every batch reads and writes."""
        rows = [*self._token_rows.all(), *self._text_rows.all()]
        return [self._tokens, self._starts, self._out, self._pooled, *rows]

    def leave_pooler_out(self) -> bool:
        """Run the pooler after batches from now on; False: it does already. Before any capture."""
        was, self._pools = self._pools, False
        return was

    def pooled(self, texts: int) -> torch.Tensor | None:
        """What the pooler made of so many texts of the latest batch ``[texts, H]``: a view, until
        the next one runs; None: it runs after batches, or there is none."""
        return self._pooled[:texts] if self._pools else None

    def held_bytes(self) -> dict[str, int]:
        """Bytes on the device, of buffers and of graphs."""
        buffers = sum(one.nbytes for one in self.fixed())
        return {"buffers": buffers, "graphs": self._captured.nbytes}

    @property
    def is_captured(self) -> bool:
        """Whether any batch is replayed: only then it can be the faster way."""
        return bool(list(self._captured))

    @property
    def is_for_nothing(self) -> bool:
        """Whether the device has graphs, and memory ended before there was one."""
        return self._captured.possible and not self.is_captured

    def bucket_of(self, tokens: int) -> int | None:
        """The bucket that holds so many tokens; None: none does."""
        return next((one for one in self._buckets if one >= tokens), None)

    def obstacle(self, feed: FlatFeed, slots: Sequence[int]) -> str | None:
        """Why a batch cannot run so, in one word for a metric; None: it can."""
        if sum(feed.lengths) > self._buckets[-1] or len(feed.lengths) > self._most_texts:
            return "rows"
        if "token_type_ids" in feed.arguments and not self._has_types:
            return "types"
        reasons = map(self._layers.obstacle, dict.fromkeys(slots))
        reason = next((one for one in reasons if one is not None), None)
        if reason is not None:
            return reason
        key = self._captured.serving(self.key_of(feed, slots))
        if key is None:
            return UNCAPTURED
        return "failed" if self._failed.is_given_up(key) else None

    def note_failure(self, feed: FlatFeed, slots: Sequence[int], error: Exception) -> None:
        """A batch that ``obstacle`` allowed has failed, and ran the other way."""
        least = self.key_of(feed, slots)
        self._failed.note(self._captured.serving(least) or least, error)

    def key_of(self, feed: FlatFeed, slots: Sequence[int]) -> StepKey:
        """What this batch needs of a prepared one."""
        own = dict.fromkeys(slots)
        rank = max((self._layers.rank(slot) for slot in own), default=0)
        has_lora = any(self._layers.has_lora(slot) for slot in own)
        tokens = self.bucket_of(sum(feed.lengths))
        assert tokens is not None  # as ``obstacle`` found
        return StepKey(tokens, *launch_class(rank, has_lora), plain=True)

    def keys(self, least: StepKey) -> list[StepKey]:
        """Every captured key that can hold what ``least`` holds; where none is, ``least`` alone."""
        return [one for one in list(self._captured) or [least] if one.holds(least)]

    def __call__(
        self, feed: FlatFeed, slots: Sequence[int], key: StepKey | None = None
    ) -> torch.Tensor:
        """The backbone's states of a batch that ``obstacle`` allows.

        Args:
            feed: The batch.
            slots: Of each text.
            key: A larger one than the batch needs; None: the least that was captured.

        Returns:
            ``[1, N, H]`` for N tokens: a view, until the next batch runs.
        """
        if key is None:
            least = self.key_of(feed, slots)
            key = self._captured.serving(least) or least
        self._fill(feed, slots, key.rows)
        if not self._captured.replay(key):
            self.run(key)
        self._failed.worked(key)
        return self._out[None, : sum(feed.lengths)]

    @torch.inference_mode()
    def run(self, key: StepKey) -> None:
        """The forward itself: reads buffers, writes buffers, and looks at nothing."""
        self._token_rows.shape(key.rows, key.rank, key.has_lora)
        texts = StaticTexts(self._starts, min(self._longest, key.rows), self._attend)
        more = {"token_type_ids": self._tokens[2, : key.rows][None]} if self._has_types else {}
        with (
            self._layers_static(self._token_rows),
            self._without_pooler() as pooler,
            self._own_attention(),
        ):
            out = self._base.backbone(
                input_ids=self._tokens[0, : key.rows][None],
                position_ids=self._tokens[1, : key.rows][None],
                texts=texts,
                **more,
                **self._constant,
            )
        self._out[: key.rows].copy_(out.last_hidden_state[0])
        if self._pools:
            # As many as a batch of these tokens can have; those of nobody read some row.
            most = min(self._most_texts, key.rows)
            first = self._starts[:most].clamp(max=key.rows - 1)
            self._text_rows.shape(most, key.rank, key.has_lora)
            with self._layers_static(self._text_rows):
                self._pooled[:most].copy_(pooler(self._out.index_select(0, first)[:, None]))

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture every bucket, as ``CapturedSteps.capture_all`` does and raises."""
        keys = [
            StepKey(tokens, rank, has_lora, plain=True)
            for tokens in self._buckets
            for rank, has_lora in LAUNCH_CLASSES
        ]
        yield from self._captured.capture_all(keys, self.run)

    def _fill(self, feed: FlatFeed, slots: Sequence[int], rows: int) -> None:
        """Write what the batch reads. Ids and positions are on the device already."""
        total = sum(feed.lengths)
        names = ("input_ids", "position_ids", "token_type_ids")
        for own, name in zip(self._tokens, names, strict=True):
            given = feed.arguments.get(name)
            if given is None:
                own[:rows].zero_()
                continue
            own[:total].copy_(given[0])
            own[total:rows].zero_()
        starts = [0]
        for length in feed.lengths:
            starts.append(starts[-1] + length)
        while starts[-1] < rows:
            starts.append(min(rows, starts[-1] + self._longest))
        self._host.reverse()
        host = self._host[0].fill_(rows)
        host[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
        self._starts.copy_(host, non_blocking=True)
        self._token_rows.fill(list(zip(slots, feed.lengths, strict=True)), rows)
        if self._pools:
            self._text_rows.fill(slots)

    @contextmanager
    def _layers_static(self, rows: StaticRows | StaticTokens) -> Iterator[None]:
        self._layers.rows = rows
        try:
            yield
        finally:
            self._layers.rows = None

    @contextmanager
    def _without_pooler(self) -> Iterator[Any]:
        """There it would read the first row of all, of which nobody knows the slot; yields it."""
        backbone: Any = self._base.backbone
        pooler = getattr(backbone, "pooler", None)
        if pooler is None:
            yield None
            return
        backbone.pooler = None
        try:
            yield pooler
        finally:
            backbone.pooler = pooler
