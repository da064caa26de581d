"""Whole static steps compared with steps of the other path, before anybody is answered by one.

A few sequences of the base and of two random adapters decode some tokens. Their prompts are read
both ways, as prompts beside static steps are and as without any, and each step runs both ways on
the same keys and values, in every bucket that was prepared, and what is told of it must agree:
tokens, their log-probabilities and those of the likeliest others. Of a step that tells tokens
alone, each must be the best of the other path, or as good as it. Where a token is drawn, or the
best of what a penalty leaves, it must be the one that the other sampler finds by the same seed:
among the scores that the step tells as its likeliest, so that no tie of two paths is in question;
where nothing is cut, by the scores of the other path, give or take what these differ by. That is
much in half precision, so what draws there is also given scores, the same as the other sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from adapters.segments import BASE_SLOT
from adapters.signature import Method
from server.base.probe_adapters import probe_factors
from server.generation.forward import PagedForward
from server.generation.kv_cache import KVCache
from server.generation.sampling import Choice, TokenChooser, truncate
from server.generation.sequences import ScheduledRows, Sequence
from server.messages import GenerateRequest, SamplingOptions

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel
    from server.generation.static_step import StaticStep

_PROMPT_TOKENS = (12, 5, 9)
# Method and rank of the adapter of each; rank 0: the bare base.
_PROBED: tuple[tuple[Method, int], ...] = (("hira", 0), ("hira", 8), ("lora", 4))
_STEPS = 2  # the first also launched before it is read
_LIKELIEST_TOLD = 20  # likeliest tokens; no cut below keeps more
_LIKELY = 8  # tokens, every other of which a penalty is to change
# Each sequence of a batch, which tells its likeliest tokens, too. Cuts show where shares are even.
_CHOICES: tuple[tuple[dict[str, Any], ...], ...] = (
    (
        {"repetition_penalty": 3.0},
        {"do_sample": True, "temperature": 3.0, "top_k": 6, "seed": 5},
        {"do_sample": True, "temperature": 2.0, "top_k": 8, "top_p": 0.6, "seed": 6},
    ),
    (
        {"do_sample": True, "temperature": 1.5, "top_k": 8, "min_p": 0.7, "seed": 7},
        {"do_sample": True, "temperature": 0.8, "seed": 8},
        {"do_sample": True, "temperature": 1.2, "repetition_penalty": 1.3, "seed": 9},
    ),
    ({}, {}, {}),
)
# Of a number in [0, 1): how far from its token's share it may be, by scores that the step tells.
_POINT_TOLERANCE = 1e-3
# Scores that both samplers are given: as far apart as those of a trained base, and the seeds.
_SPREAD = 2.0
_DRAWN_SEEDS = range(4)
# One prompt is longer than a page, and than the window if that is no wider than this.
_WIDEST_WINDOW_TOKENS = 1100
_BEYOND_TOKENS = 5
_LAST_PIECE_TOKENS = 4  # of a prompt, read once more as one that was begun
# Of a log-probability, relative where it is above 1: what sums in another order may cost.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


def step_fault(
    forward: PagedForward,
    adapted: AdaptedModel,
    kv: KVCache,
    begin: Callable[[GenerateRequest, int], Sequence],
) -> str | None:
    """How static steps differ from the others; None: they agree.

    Args:
        forward: Whose ``static`` is tried; nothing may run on it.
        adapted: No slot may be in use; two are filled where there are as many, and emptied again.
        kv: With room for as many short sequences as a step takes, three at most; without it nothing
            can be compared, which is a fault too. A longer one is as long as it has room for.
        begin: Makes a running sequence of a request, in a slot.
    """
    layers, static = adapted.modulator.static, forward.static
    assert layers is not None
    assert static is not None
    made = [s for s, (_, rank) in enumerate(_PROBED) if rank and s < layers.slots]
    prompts = [
        (slot if slot in made else BASE_SLOT, tokens) for slot, tokens in enumerate(_PROMPT_TOKENS)
    ]
    most = static.most_rows
    plain = SamplingOptions(_STEPS + 1, ignore_eos=True)
    told = replace(plain, logprobs=True, alternatives=_LIKELIEST_TOLD)
    wishes = [[replace(told, **one) for one in choices] for choices in _CHOICES]
    wishes.append([plain] * len(prompts))
    batches = [
        (wish[first : first + most], prompts[first : first + most])
        for wish in wishes
        for first in range(0, len(prompts), most)
    ]
    batches.append(([told], [(min(1, layers.slots - 1), _long_prompt(kv))]))
    try:
        for slot in made:
            factors = probe_factors(
                adapted, slot, *_PROBED[slot], dtype=layers.dtype, serves=layers.serves
            )
            adapted.install(slot, factors)
        faults = (_fault_of_steps(forward, kv, begin, *one) for one in batches)
        return next((one for one in faults if one is not None), None)
    finally:
        for slot in made:
            adapted.uninstall(slot)


def _fault_of_steps(
    forward: PagedForward,
    kv: KVCache,
    begin: Callable[[GenerateRequest, int], Sequence],
    wishes: list[SamplingOptions],
    prompts: list[tuple[int, int]],
) -> str | None:
    """As ``step_fault``, of one batch: the options, the slot and the tokens of each sequence."""
    static = forward.static
    assert static is not None
    most = _TOLERANCE.get(kv.dtype, _HALF_TOLERANCE)
    sequences: list[Sequence] = []
    try:
        for number, (wish, (slot, tokens)) in enumerate(zip(wishes, prompts, strict=True)):
            ids = tuple(range(3 + number, 3 + number + tokens))
            ids = tuple(one % static.buffers.vocabulary for one in ids)
            request = GenerateRequest(f"step probe {number}", None, None, ids, wish)
            if kv.reserve(request.id, None, ids, tokens + _STEPS + 1, share=False) is None:
                return "the cache has no room for the sequences that are compared"
            sequences.append(begin(request, slot))
        worst = _read_prompts(forward, kv, sequences, most)
        if worst > most:
            return f"log-probabilities of prompts differ by {worst:.1e}, not {most:.0e}"
        for step in range(_STEPS):
            parts = [ScheduledRows(one, 1) for one in sequences]
            wanted = forward.dynamic(parts)
            if step == 0:
                _make_penalties_matter(sequences, wanted)
                if not _draws_alike(static, sequences, wanted):
                    return "tokens or log-probabilities differ: others are drawn of the same scores"
            alone = _alone(forward, parts) if step == 0 else ()
            found = (*forward.in_every_bucket(parts), *alone)
            worst = _largest(found, wanted, sequences, most)
            # What a wrong step chose may be no token at all: nothing is run on it.
            if worst <= most and step < _STEPS - 1:
                first, second = _launched_ahead(forward, sequences)
                worst = _largest([first], wanted, sequences, most)
                if worst <= most:
                    # With its own choice, which may be the other one of a tie.
                    _advance(kv, parts, [choice.token_id for choice in first])
                    parts = [ScheduledRows(one, 1) for one in sequences]
                    worst = _largest([second], forward.dynamic(parts), sequences, most)
            if worst > most:
                return f"tokens or log-probabilities differ by {worst:.1e}, not {most:.0e}"
    finally:
        for one in sequences:
            kv.release(one.request.id, forget=True)
    return None


def _long_prompt(kv: KVCache) -> int:
    """Tokens of the longer prompt."""
    window = kv.window if kv.window is not None and kv.window <= _WIDEST_WINDOW_TOKENS else 0
    room = min(kv.capacity_tokens, kv.context_tokens) - _STEPS - 1
    return max(1, min(max(kv.block_tokens, window) + _BEYOND_TOKENS, room))


def _read_prompts(
    forward: PagedForward, kv: KVCache, sequences: list[Sequence], most: float
) -> float:
    """Read all prompts, both ways, and choose a first token; how much the two ways differ.

    A prompt is read whole, then its end once more as that of one which was begun: what was written
    is written again, the same. What remains in the cache is of the other path.
    """
    for one in sequences:
        while one.pending > kv.step_tokens:
            part = ScheduledRows(one, kv.step_tokens)
            forward.dynamic([part])
            kv.written(one.request.id, part.rows, ())
            one.written += part.rows
    worst = 0.0
    for again in (False, True):
        if again:
            for one in sequences:
                one.written = max(one.written, len(one.ids) - _LAST_PIECE_TOKENS, 0)
        parts = [ScheduledRows(one, one.pending) for one in sequences]
        found = forward.chosen(parts)
        wanted = forward.dynamic(parts)
        worst = max(worst, _largest([found], wanted, sequences, most))
    for one in sequences:
        one.written = kv.length(one.request.id)
    _advance(kv, [ScheduledRows(one, one.pending) for one in sequences], _best(wanted))
    return worst


def _launched_ahead(
    forward: PagedForward, sequences: list[Sequence]
) -> tuple[list[Choice], list[Choice]]:
    """What two steps choose, the second launched before the first is read."""
    first = forward.launch_static(sequences, None)
    second = forward.launch_static(sequences, first)
    return first.choices(), second.choices()


def _alone(forward: PagedForward, parts: list[ScheduledRows]) -> list[list[Choice]]:
    """Each part in a step of its own, all of them once."""
    assert forward.static is not None
    return [[choice for part in parts for choice in forward.by_static([part])]]


def _advance(kv: KVCache, parts: list[ScheduledRows], tokens: list[int]) -> None:
    for part, token in zip(parts, tokens, strict=True):
        sequence = part.sequence
        kv.written(sequence.request.id, part.rows, ())
        sequence.written += part.rows
        sequence.ids.append(token)
        sequence.chooser.note(token)


def _make_penalties_matter(sequences: list[Sequence], wanted: torch.Tensor) -> None:
    """Let sequences with a penalty have had the tokens that come next otherwise."""
    for one, row in zip(sequences, wanted, strict=True):
        if one.chooser.penalized:
            likely = row.topk(min(_LIKELY, len(row))).indices.tolist()
            one.chooser = TokenChooser(one.request.sampling, [*likely[::2], one.ids[-1]])


def _draws_alike(static: StaticStep, sequences: list[Sequence], logits: torch.Tensor) -> bool:
    """Whether tokens that are drawn with nothing cut are those of the other sampler.

    Args:
        static: Whose sampler is given the scores alone; no step is run.
        sequences: Before the step.
        logits: ``[sequences, vocabulary]``; what they are matters little.
    """
    if not any(_is_uncut(one.request.sampling) for one in sequences):
        return True
    scores = logits.float() - logits.float().mean(-1, keepdim=True)
    scores *= _SPREAD / scores.std(-1, keepdim=True).clamp(min=1e-9)
    own = [one.chooser for one in sequences]
    try:
        for seed in _DRAWN_SEEDS:
            for one, chooser in zip(sequences, own, strict=True):
                wish = replace(one.request.sampling, seed=seed)
                one.chooser = TokenChooser(wish, chooser.history.tolist())
            found = static.chosen_of(scores, sequences)
            for choice, row, one in zip(found, scores.cpu(), sequences, strict=True):
                if _is_uncut(one.request.sampling) and not _is_chosen(
                    choice, row, one.chooser, _POINT_TOLERANCE
                ):
                    return False
    finally:
        for one, chooser in zip(sequences, own, strict=True):
            one.chooser = chooser
    return True


def _is_uncut(options: SamplingOptions) -> bool:
    return options.do_sample and not options.top_k and options.top_p == 1.0 and not options.min_p


def _best(logits: torch.Tensor) -> list[int]:
    """The token of each row that nothing but its logits chooses."""
    return [int(one) for one in logits.argmax(-1)]


def _largest(
    found: Iterable[list[Choice]], wanted: torch.Tensor, sequences: list[Sequence], most: float
) -> float:
    """The largest difference of several times the same step.

    Args:
        found: What was chosen each time.
        wanted: ``[sequences, vocabulary]``, the logits of the other path.
        sequences: As they were before the step.
        most: That log-probabilities may differ.
    """
    logits = wanted.float().cpu()
    differences = [
        _difference(choice, row, one.chooser, most)
        for choices in found
        for choice, row, one in zip(choices, logits, sequences, strict=True)
    ]
    return max(differences, default=0.0)  # none: such a step was not captured, and never runs


def _difference(found: Choice, logits: torch.Tensor, chooser: TokenChooser, most: float) -> float:
    """Of all that is told, relative where it is above 1; infinite where it cannot be compared.

    Args:
        found: A token, its log-probability and those of others as far as they are told.
        logits: float32 ``[vocabulary]``, by the other path.
        chooser: What chooses it there.
        most: That log-probabilities may differ.
    """
    wanted = logits.log_softmax(-1)
    told = [token for token, _ in found.likeliest]
    if not found.finite or not all(0 <= one < len(wanted) for one in (found.token_id, *told)):
        return float("inf")
    own = float(wanted[found.token_id])
    pairs: list[tuple[float, float]] = []
    if not chooser.sampled and not chooser.penalized:
        pairs.append((own, float(wanted.max())))  # two that are equally good may change places
    elif not _is_chosen(found, logits, chooser, most):
        return float("inf")
    if found.logprob is not None:
        pairs.append((found.logprob, own))
    pairs += [(value, float(wanted[token])) for token, value in found.likeliest]
    # Each place has its likeliest token, or one that is as good.
    values = wanted.topk(len(told)).values.tolist()
    pairs += [(value, best) for (_, value), best in zip(found.likeliest, values, strict=True)]
    worst = 0.0
    for mine, theirs in pairs:
        error = abs(mine - theirs) / max(1.0, abs(theirs))
        # NaN compares as neither: it must not pass.
        worst = max(worst, error if isfinite(error) else float("inf"))
    return worst


def _is_chosen(found: Choice, logits: torch.Tensor, chooser: TokenChooser, most: float) -> bool:
    """Whether the other sampler chooses the same token, or one that is as near to the number drawn.

    Args:
        found: A token that was drawn, or the best of what a penalty left, with the likeliest ones.
        logits: float32 ``[vocabulary]``, by the other path; those of tokens that are told are taken
            as they are told.
        chooser: Of its request.
        most: That log-probabilities of other tokens may differ.
    """
    options, token = chooser.options, found.token_id
    scores = logits.clone()
    total = float(logits.logsumexp(-1))
    for one, value in found.likeliest:
        scores[one] = value + total
    if chooser.changes is not None:
        chooser.changes.apply(scores)
    if not chooser.sampled:
        best, own = float(scores.max()), float(scores[token])
        return best - own <= _POINT_TOLERANCE * max(1.0, abs(best))
    cut = 0 < options.top_k <= len(found.likeliest)
    slack = _POINT_TOLERANCE if cut else most
    shares = truncate((scores / options.temperature)[None], [options])[0].double()
    ends = shares.cumsum(-1)
    point = chooser.draw() * float(ends[-1])
    last, first = float(ends[token]), float(ends[token] - shares[token])
    return float(shares[token]) > 0 and first - slack <= point <= last + slack
