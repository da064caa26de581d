"""Whole static steps compared with steps of the other path, before anybody is answered by one.

A few sequences of the base and of two random adapters decode some tokens. Each step runs both ways
on the same keys and values, in every bucket that was prepared, and what is told of it must agree:
tokens, their log-probabilities and those of the likeliest others.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING

import torch

from adapters.segments import BASE_SLOT
from adapters.signature import Method
from server.base.probe_adapters import probe_factors
from server.generation.forward import PagedForward
from server.generation.kv_cache import KVCache
from server.generation.sampling import Choice
from server.generation.sequences import ScheduledRows, Sequence
from server.messages import GenerateRequest, SamplingOptions

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel

_PROMPT_TOKENS = (12, 5, 9)
# Method and rank of the adapter of each; rank 0: the bare base.
_PROBED: tuple[tuple[Method, int], ...] = (("hira", 0), ("hira", 8), ("lora", 4))
_STEPS = 3
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
        adapted: No slot may be in use; two are filled, and emptied again.
        kv: With room for three short sequences; without it nothing is compared.
        begin: Makes a running sequence of a request, in a slot.
    """
    made = [slot for slot, (_, rank) in enumerate(_PROBED) if rank]
    layers = adapted.modulator.static
    assert layers is not None
    try:
        for slot in made:
            factors = probe_factors(
                adapted, slot, *_PROBED[slot], dtype=layers.dtype, serves=layers.serves
            )
            adapted.install(slot, factors)
        return _fault_of_steps(forward, kv, begin)
    finally:
        for slot in made:
            adapted.uninstall(slot)


def _fault_of_steps(
    forward: PagedForward, kv: KVCache, begin: Callable[[GenerateRequest, int], Sequence]
) -> str | None:
    options = (
        SamplingOptions(_STEPS + 1, ignore_eos=True),
        SamplingOptions(_STEPS + 1, ignore_eos=True, logprobs=True, alternatives=5),
    )
    static = forward.static
    assert static is not None
    worst = 0.0
    for wish in options:
        sequences: list[Sequence] = []
        try:
            for slot, tokens in enumerate(_PROMPT_TOKENS):
                ids = tuple(range(3 + slot, 3 + slot + tokens))
                ids = tuple(one % static.buffers.vocabulary for one in ids)
                request = GenerateRequest(f"step probe {slot}", None, None, ids, wish)
                if kv.reserve(request.id, None, ids, tokens + _STEPS + 1, share=False) is None:
                    return None
                sequences.append(begin(request, slot if _PROBED[slot][1] else BASE_SLOT))
            parts = [ScheduledRows(one, one.pending) for one in sequences]
            _advance(kv, parts, forward.dynamic(parts))
            for step in range(_STEPS):
                parts = [ScheduledRows(one, 1) for one in sequences]
                wanted = forward.dynamic(parts)
                for found in (*forward.in_every_bucket(parts), *_alone(forward, parts)):
                    for mine, theirs in zip(found, wanted, strict=True):
                        worst = max(worst, _difference(mine, theirs))
                ahead = _launched_ahead(forward, sequences) if step < _STEPS - 1 else []
                _advance(kv, parts, wanted)
                if ahead:
                    parts = [ScheduledRows(one, 1) for one in sequences]
                    for mine, theirs in zip(ahead, forward.dynamic(parts), strict=True):
                        worst = max(worst, _difference(mine, theirs))
        finally:
            for one in sequences:
                kv.release(one.request.id, forget=True)
    most = _TOLERANCE.get(kv.dtype, _HALF_TOLERANCE)
    return None if worst <= most else f"log-probabilities differ by {worst:.1e}, not {most:.0e}"


def _launched_ahead(forward: PagedForward, sequences: list[Sequence]) -> list[Choice]:
    """What two steps choose, the second launched before the first is read; of the second."""
    first = forward.launch_static(sequences, None)
    second = forward.launch_static(sequences, first)
    first.choices()
    return second.choices()


def _alone(forward: PagedForward, parts: list[ScheduledRows]) -> list[list[Choice]]:
    """Each part in a step of its own, all of them once."""
    assert forward.static is not None
    return [[choice for part in parts for choice in forward.by_static([part])]]


def _advance(kv: KVCache, parts: list[ScheduledRows], choices: list[Choice]) -> None:
    for part, choice in zip(parts, choices, strict=True):
        sequence = part.sequence
        kv.written(sequence.request.id, part.rows, ())
        sequence.written += part.rows
        sequence.ids.append(choice.token_id)


def _difference(found: Choice, wanted: Choice) -> float:
    """Of all that both tell; infinite where the tokens are not the same."""
    if found.finite != wanted.finite:
        return float("inf")
    if found.logprob is None or wanted.logprob is None:
        # The best token alone: another one is told apart from a tie by the other steps.
        return 0.0
    known = dict(wanted.likeliest)
    pairs = [(value, known[token]) for token, value in found.likeliest if token in known]
    if not pairs:
        return float("inf")
    pairs.append((found.logprob, wanted.logprob))
    worst = max(abs(mine - theirs) / max(1.0, abs(theirs)) for mine, theirs in pairs)
    return worst if isfinite(worst) else float("inf")
