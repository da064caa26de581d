"""A batch of texts side by side, without padding: N tokens are N rows, whatever their lengths.

The backbone takes ``[1, N]`` ids with the position that each token has in its own text, and every
attention layer, reached through transformers' attention interface, keeps each text to itself:

    out[i] = softmax(q[i] · k[j] scale) · v[j],  over j of the same text, and with a window w,
    |i - j| < w; where the layer is causal, j ≤ i

``attend_by_varlen`` is torch's own kernel for CUDA, always with one split of the keys, so that an
answer does not depend on its batch. ``attend_text_by_text`` computes the same on any device. Which
bases can run so is not written down anywhere: ``unpadded_obstacle`` compares whole forwards with
padded ones before anybody is answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from adapters import segments
from adapters.modulation.static_layers import StaticLayers
from adapters.signature import Method
from server.base.captured_steps import UNCAPTURED, GraphPool, StepKey
from server.base.load import LoadedBase
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.base.varlen import varlen_obstacle
from server.encoding.batch import FlatFeed, Rows
from server.encoding.read import BatchStates
from server.encoding.static_batch import StaticBatch, attend_under_mask
from server.encoding.text_bounds import Attend, TextBounds
from server.encoding.way_times import WAYS, WayTimes
from server.failures import is_lost
from server.messages import TokenizedInput

logger = logging.getLogger(__name__)

UNPADDED_ATTENTION: Final = "hira_unpadded"
_LAYER_KINDS: Final = {"full_attention", "sliding_attention"}
# Tokens of the texts that are compared, and the adapter of each; rank 0: the bare base.
_COMPARED_TOKENS: Final = (12, 5, 9, 5)
_COMPARED_ADAPTERS: Final[tuple[tuple[Method, int], ...]] = (
    ("hira", 0),
    ("hira", 4),
    ("lora", 4),
    ("lora", 4),
)
# Of the states of a text, relative: what another order of sums may cost.
_STATES_TOLERANCE: Final = {torch.float32: 1e-3}
_STATES_TOLERANCE_HALF: Final = 0.1


def attend_text_by_text(  # noqa: PLR0917  # as ``Attend``, which has no names
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: TextBounds,
    scale: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """Each run of texts of one length as one batch without a mask; on any device."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (one.repeat_interleave(shared, dim=1) for one in (key, value))
    pieces: list[torch.Tensor] = []
    for start, count, tokens in texts.runs():
        rows = slice(start, start + count * tokens)
        q, k, v = (
            one[rows].view(count, tokens, *one.shape[1:]).transpose(1, 2)
            for one in (query, key, value)
        )
        mask = None
        if window is not None and tokens > window:
            mask = _band(tokens, window, causal=causal, device=query.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        pieces.append(attended.transpose(1, 2).reshape(count * tokens, *attended.shape[1::2]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def attend_by_varlen(  # noqa: PLR0917  # as ``Attend``, which has no names
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: TextBounds,
    scale: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """All texts at once, by torch's FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    found = varlen_attn(
        query,
        key,
        value,
        texts.starts,
        texts.starts,
        texts.longest,
        texts.longest,
        scale=scale,
        window_size=(left, 0 if causal else left),
        enable_gqa=query.shape[1] != key.shape[1],
        # The automatic choice makes an answer depend on its batch.
        num_splits=1,
    )
    assert isinstance(found, torch.Tensor)
    return found


def unpadded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    texts: TextBounds,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend each row of a flattened batch to its own text.

    Args:
        query: ``[1, heads, N, dim]``; key, value: ``[1, kv_heads, N, dim]``.
        attention_mask: None: who sees whom follows from ``texts``.
        texts: Where they are.

    Returns:
        ``[1, N, heads, dim]``, and None for the weights.

    Raises:
        ValueError: The model asks for what is not supported here: a mask or a bias of its own, a
            soft cap, attention sinks.
    """
    for name in ("s_aux", "sinks", "position_bias", "softcap"):
        if others.get(name) is not None:
            raise ValueError(f"Attention without padding does not support {name!r}.")
    if attention_mask is not None:
        raise ValueError("Attention without padding does not support a mask of the model's own.")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    rows = [one[0].transpose(0, 1) for one in (query, key, value)]
    out = texts.attend(rows[0], rows[1], rows[2], texts, scaling, sliding_window, causal)
    texts.windows.append(sliding_window is not None)
    return out[None], None


class UnpaddedForward:
    """Runs the backbone of one base over texts without padding.

    Args:
        base: The loaded base, of texts.
        rows: Makes what it takes.
        rope: Its rotary embeddings that choose by length.
    """

    def __init__(self, base: LoadedBase, rows: Rows, rope: RopeByLength) -> None:
        self._base = base
        self._rows = rows
        self._rope = rope
        self._config = base.backbone.config.get_text_config()
        config = self._config
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // max(1, config.num_attention_heads)
        fast = varlen_obstacle(int(width), base.dtype, base.device, capped=False) is None
        self._attend: Attend = attend_by_varlen if fast else attend_text_by_text
        self._attend_static: Attend = attend_by_varlen if fast else attend_under_mask
        self.static: StaticBatch | None = None
        self._static_layers: StaticLayers | None = None
        self._times = WayTimes(WAYS)
        self.ran = "unpadded"  # how the latest batch did: or ``static``, or why not
        self.windows: list[bool] = []  # of the latest forward: see ``TextBounds``

    def make_static(
        self,
        slots: int,
        most_tokens: int,
        most_texts: int,
        *,
        pool: GraphPool | None = None,
        spare_bytes: int = 0,
    ) -> str | None:
        """Run batches over fixed buffers from now on; before any adapter is installed.

        Args:
            slots: How many slots there will ever be, slot 0 included.
            most_tokens, most_texts: Of a batch.
            pool, spare_bytes: As of ``StaticBatch``.

        Returns:
            Why they cannot; None: they do.
        """
        if self._rope.kinds:
            return "the rotary factors of this base depend on the length"
        self._static_layers = self._base.adapted.make_static(slots)
        self.static = StaticBatch(
            self._base, self._static_layers, most_tokens, most_texts,
            attend=self._attend_static, own_attention=self._own_attention,
            pool=pool, spare_bytes=spare_bytes,
        )  # fmt: skip
        return None

    def leave_static(self) -> None:
        """Run no batch over fixed buffers from now on, and give back what they took."""
        self.static = None
        if self._static_layers is not None:
            self._base.adapted.leave_static(self._static_layers)
            self._static_layers = None

    def feed(self, items: Sequence[TokenizedInput]) -> FlatFeed:
        """Some texts as the backbone takes them."""
        return self._rows.side_by_side(items)

    def capture_static(self) -> Iterator[tuple[int, int]]:
        """Capture static batches where the device can; yields how many of how many are done.

        Raises:
            CannotCapture: The device cannot capture them.
        """
        if self.static is not None:
            yield from self.static.capture()

    def by_static(
        self,
        items: Sequence[TokenizedInput],
        slots: Sequence[int],
        key: StepKey | None = None,
        feed: FlatFeed | None = None,
    ) -> BatchStates:
        """As a call, over fixed buffers, which ``obstacle`` of these must allow.

        Args:
            items, slots: As of a call.
            key: Of the launches; None: what they need.
            feed: Of the items, if it is made.
        """
        assert self.static is not None
        feed = feed or self.feed(items)
        hidden = feed.laid_out(self.static(feed, slots, key))
        pooler = getattr(self._base.backbone, "pooler", None)
        pooled = self.static.pooled(len(feed.lengths))
        if pooled is None and pooler is not None:
            tokens = segments.from_runs(zip(slots, feed.lengths, strict=True))
            with self._base.adapted.batch(tokens, segments.from_rows(slots)):
                pooled = pooler(hidden)
        self.ran = "static"
        return BatchStates(hidden, pooled, feed.ids, feed.mask)

    def __call__(self, items: Sequence[TokenizedInput], slots: Sequence[int]) -> BatchStates:
        """What the backbone makes of some texts, each in its slot, laid out with padding.

        States at padding are those of a token of the same text: finite where the text's are. They
        may be a view of a buffer, until the next call.
        """
        if self.static is None:
            return self.side_by_side(items, slots)
        feed = self.feed(items)
        reason = self.static.obstacle(feed, slots)
        if reason is not None:
            states = self.side_by_side(items, slots, feed)
            self.ran = reason
            return states
        tokens = sum(feed.lengths)
        bucket = self.static.bucket_of(tokens)
        if not self.static.is_captured:
            return self._static_if_it_can(items, slots, feed)
        run = self._static_if_it_can
        if self._times.way(bucket) == "unpadded":
            run = self.side_by_side
        if not self._times.is_due(bucket):
            return run(items, slots, feed)
        self._wait()
        began = time.perf_counter()
        states = run(items, slots, feed)
        self._wait()
        seconds = (time.perf_counter() - began) / tokens
        for way in WAYS:
            if self.ran == way:
                self._times.note(bucket, way, seconds)
        return states

    def _wait(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)

    def _static_if_it_can(
        self, items: Sequence[TokenizedInput], slots: Sequence[int], feed: FlatFeed
    ) -> BatchStates:
        assert self.static is not None
        try:
            return self.by_static(items, slots, None, feed)
        except Exception as error:
            if is_lost(error):
                raise
            failed = error.with_traceback(None)
        # What raises here as well is the fault of a text or an adapter, and not of the batch's way.
        states = self.side_by_side(items, slots, feed)
        self.static.note_failure(feed, slots, failed)
        self.ran = "failed"
        return states

    def side_by_side(
        self, items: Sequence[TokenizedInput], slots: Sequence[int], feed: FlatFeed | None = None
    ) -> BatchStates:
        """As a call, never over fixed buffers.

        Args:
            items, slots: As of a call.
            feed: Of the items, if it is made.
        """
        self.ran = "unpadded"
        feed = feed or self.feed(items)
        lengths = feed.lengths
        texts = TextBounds(lengths, feed.starts, self._attend)
        tokens = segments.from_runs(zip(slots, lengths, strict=True))
        of_token = [[one for one in lengths for _ in range(one)]] if self._rope.kinds else [[]]
        with (
            self._base.adapted.batch(tokens, segments.from_rows(slots)),
            self._rope.sequences(of_token, self._base.device),
            self._own_attention(),
            self._pooler_of_texts(feed.laid_out),
        ):
            out = self._base.backbone(**feed.arguments, texts=texts)
        self.windows = texts.windows
        hidden = feed.laid_out(out.last_hidden_state)
        return BatchStates(hidden, getattr(out, "pooler_output", None), feed.ids, feed.mask)

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        before = self._config._attn_implementation
        self._config._attn_implementation = UNPADDED_ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before

    @contextmanager
    def _pooler_of_texts(self, laid_out: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """A pooler reads the first token of each text, and there it sees one row for all."""
        pooler = getattr(self._base.backbone, "pooler", None)
        if pooler is None:
            yield
            return
        hook = pooler.register_forward_pre_hook(lambda _, given: (laid_out(given[0]), *given[1:]))
        try:
            yield
        finally:
            hook.remove()


def unpadded_obstacle(
    base: LoadedBase,
    unpadded: UnpaddedForward,
    padded: Callable[[Sequence[Any], Sequence[int]], BatchStates],
) -> tuple[str, str] | None:
    """Why a base's texts keep their padding: a word for a metric, and what was found; None: they
    need none.

    Some texts of the base and of two random adapters run both ways.

    Args:
        base: Idle; no slot may be in use: two are filled, and emptied again.
        unpadded, padded: The ways.

    Raises:
        Exception: Either way does.
    """
    with _compared_adapters(base) as slots, torch.inference_mode():
        items = probe_texts(base)
        found, wanted = unpadded.side_by_side(items, slots), padded(items, slots)
    expected = _windows_of(base.backbone.config.get_text_config())
    if expected is None:
        return "window", "some layers attend neither to all of a text nor to a sliding window"
    told = unpadded.windows
    if len(told) != len(expected):
        return "interface", (
            f"{len(told)} of {len(expected)} layers attend through transformers' interface for it"
        )
    if told != expected:
        # No comparison of short texts would show it.
        return "window", "some layers do not tell the attention interface of their sliding window"
    error = _largest_error(found, wanted)
    most = _STATES_TOLERANCE.get(base.dtype, _STATES_TOLERANCE_HALF)
    return None if error <= most else ("differs", f"states differ by {error:.1e}, not {most:.0e}")


def static_fault(
    base: LoadedBase,
    unpadded: UnpaddedForward,
    padded: Callable[[Sequence[Any], Sequence[int]], BatchStates],
) -> str | None:
    """How batches over fixed buffers differ from padded ones, with any prepared launches.

    Args:
        base, unpadded, padded: As of ``unpadded_obstacle``; ``unpadded.static`` is tried.

    Raises:
        Exception: Either way does.
    """
    static = unpadded.static
    assert static is not None
    worst = 0.0
    with _compared_adapters(base, static=True) as slots, torch.inference_mode():
        items = probe_texts(base)
        # The first text alone needs fewer tokens: launches that are made for few are tried, too.
        for count in (len(items), 1):
            some, own = items[:count], slots[:count]
            feed = unpadded.feed(some)
            reason = static.obstacle(feed, own)
            if reason == UNCAPTURED and count > 1:
                continue  # batches as large as this one never run so
            if reason is not None:
                return f"the texts that are compared cannot run so: {reason}"
            wanted = padded(some, own)
            for key in static.keys(static.key_of(feed, own)):
                found = unpadded.by_static(some, own, key)
                worst = max(worst, _largest_error(found, wanted))
    most = _STATES_TOLERANCE.get(base.dtype, _STATES_TOLERANCE_HALF)
    return None if worst <= most else f"states differ by {worst:.1e}, not {most:.0e}"


@contextmanager
def _compared_adapters(base: LoadedBase, *, static: bool = False) -> Iterator[list[int]]:
    """Random adapters in slots that are empty again afterwards; yields the slot of each text."""
    adapted = base.adapted
    layers = adapted.modulator.static if static else None
    made: list[int] = []
    try:
        for slot, (method, rank) in enumerate(_COMPARED_ADAPTERS):
            if not rank or (layers is not None and slot >= layers.slots):
                continue
            serves = (lambda _: True) if layers is None else layers.serves
            factors = probe_factors(adapted, slot, method, rank, dtype=base.dtype, serves=serves)
            adapted.install(slot, factors)
            made.append(slot)
        yield [
            place if place in made else segments.BASE_SLOT
            for place in range(len(_COMPARED_ADAPTERS))
        ]
    finally:
        for slot in made:
            adapted.uninstall(slot)


def probe_texts(base: LoadedBase) -> list[TokenizedInput]:
    """Texts of several lengths, no two alike; the same where a base takes only short ones."""
    signature = base.adapted.signature
    vocabulary = signature.vocab_size or 1
    longest = max(1, signature.max_length)
    return [
        TokenizedInput(tuple((11 * place + 7 * at + 5) % vocabulary for at in range(tokens)))
        for place, tokens in enumerate(min(one, longest) for one in _COMPARED_TOKENS)
    ]


def _largest_error(found: BatchStates, wanted: BatchStates) -> float:
    """‖found − wanted‖ / ‖wanted‖ of the text where it is largest; infinite where not finite."""
    pairs = [
        (mine[of_text == 1], theirs[of_text == 1])
        for mine, theirs, of_text in zip(found.hidden, wanted.hidden, wanted.mask, strict=True)
    ]
    if (found.pooled is None) != (wanted.pooled is None):
        return float("inf")
    if found.pooled is not None and wanted.pooled is not None:
        pairs += list(zip(found.pooled, wanted.pooled, strict=True))
    errors = [
        float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-12))
        for mine, theirs in pairs
    ]
    # NaN compares as neither: it must not pass.
    return max(one if one == one else float("inf") for one in errors)  # noqa: PLR0124


def _windows_of(config: Any) -> list[bool] | None:
    """Of each layer, whether it has a sliding window; None: layers of another kind."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        if not set(kinds) <= _LAYER_KINDS:
            return None
        return [kind == "sliding_attention" for kind in kinds]
    slides = bool(getattr(config, "sliding_window", None))
    slides = slides and bool(getattr(config, "use_sliding_window", True))
    return [slides] * int(config.num_hidden_layers)


def _band(tokens: int, window: int, *, causal: bool, device: torch.device) -> torch.Tensor:
    """bool ``[tokens, tokens]``: who sees whom within a window."""
    place = torch.arange(tokens, device=device)
    distance = place[:, None] - place
    sees = distance.abs() < window
    return sees & (distance >= 0) if causal else sees


AttentionInterface.register(UNPADDED_ATTENTION, unpadded_attention)
