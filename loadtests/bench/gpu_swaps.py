"""Adapters that come and go while others decode: no capture, no wrong token, memory flat."""

from __future__ import annotations

import itertools
import time

import torch

from loadtests.bench.part_clock import PartClock
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import Figure, Report
from server.engine.engine import Engine
from server.messages import GenerateRequest, GenerateResult, SamplingOptions

_TOGETHER = 3  # requests at a time, each on another adapter
_NEW_TOKENS = 4
_MOST_GROWTH_BYTES = 64 << 20
_TIE = 0.1  # of log-probabilities, in bfloat16
_numbers = itertools.count()


def measure_swaps(
    report: Report,
    case: str,
    engine: Engine,
    versions: tuple[str, ...],
    *,
    swaps: int,
    clock: PartClock,
) -> None:
    """Decode on adapters in turn, in fewer slots than there are adapters, and hold every token.

    Args:
        report: Gets the figures.
        case: Named in them.
        engine: Idle; it has fewer slots than ``versions``.
        versions: Of adapters, at least three.
        swaps: Adapters that leave their slots to others.
        clock: Ends it earlier; how many there were is told.
    """
    alone = {version: _tokens(engine, [version])[0] for version in versions}
    began, before = time.perf_counter(), engine.snapshot()
    reserved = _reserved_bytes(engine)
    swapped, wrong, turn = 0, 0, 0
    while swapped < swaps and clock.left_s > 0:
        # Neighbours in a circle: each group finds one of its adapters gone at the least.
        some = [versions[(turn + place) % len(versions)] for place in range(_TOGETHER)]
        turn += _TOGETHER
        for version, tokens in zip(some, _tokens(engine, some), strict=True):
            wrong += _is_wrong(tokens, alone[version])
        swapped = engine.snapshot().totals["eviction"] - before.totals["eviction"]
    seconds, after = time.perf_counter() - began, engine.snapshot()
    if swapped < swaps:
        report.leave_out(f"swaps: {case}: {swaps - swapped} of {swaps}: its time was up")
    graphs = after.static_bytes.get("graphs", 0) - before.static_bytes.get("graphs", 0)
    grown = _reserved_bytes(engine) - reserved

    def add(what: str, value: float, unit: str, at_most: float | None = None) -> None:
        report.add(Figure("gpu", f"{case}, swaps", what, value, unit=unit, at_most=at_most))

    add("adapters that left their slots", swapped, "swaps")
    add("time of a swap with its requests", seconds / max(1, swapped) * 1e3, "ms")
    add("answers with a wrong token", wrong, "answers", 0.0)
    add("bytes of graphs captured meanwhile", graphs, "bytes", 0.0)
    add("device memory more than before", grown, "bytes", _MOST_GROWTH_BYTES)


def _is_wrong(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> bool:
    """Whether tokens differ where they were no tie: a batch of another size may round otherwise."""
    for (token, score), (other, known) in zip(found, wanted, strict=True):
        if token != other:
            return abs(score - known) > _TIE
    return False


def _tokens(engine: Engine, versions: list[str]) -> list[list[tuple[int, float]]]:
    """Token and log-probability of each answer, all asked for at once."""
    vocabulary = engine.base.adapted.signature.vocab_size
    requests = [
        GenerateRequest(
            id=f"gpu-swap-{next(_numbers)}",
            adapter=version,
            version=version,
            token_ids=tuple((5 + 37 * at) % vocabulary for at in range(9)),
            sampling=SamplingOptions(max_new_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=True),
            submitted=time.monotonic(),
        )
        for version in versions
    ]
    ended = run_to_end(engine, requests)
    found: list[list[tuple[int, float]]] = []
    for request in requests:
        event = ended[request.id]
        assert isinstance(event, GenerateResult)
        found.append([(token.id, token.logprob or 0.0) for token in event.tokens])
    return found


def _reserved_bytes(engine: Engine) -> int:
    device = engine.base.device
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
