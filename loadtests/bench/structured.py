"""Answers held to grammars in the engine without HTTP: what a step with them costs, in turns.

Sixteen rows of the embedded demo decode together: all free, one held to a pattern, all held, and
one held to a grammar that is slow to follow. Rates are compared by the clock and by the processor
time of all threads, which tells what the work costs where a busy machine does not leave it its
cores.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.bench.runs import raise_if_failed
from loadtests.bench.timing import THREADS, Budget, DTypeName, Figure, Report, ratio_of
from server.demo import BASE_DIR
from server.engine.engine import Engine
from server.inputs.grammar_engine import engine_text
from server.messages import TERMINAL, Cancel, GenerateRequest, Grammar, SamplingOptions
from server.options import EngineOptions

ROWS = 16
ROW_TOKENS = 128
PROMPT = "The film was"
LONG = Grammar(engine_text("regex", "[A-Za-z ,.]{900,1000}"), "long")
# Ambiguous: the longer the text, the more ways to read it.
SLOW = Grammar(engine_text("lark", "start: part\npart: part part | /[a-z ]/"), "slow")
GOALS = {"1 held": 0.97, "all held": 0.9, "1 slow to follow": 0.95}
_numbers = itertools.count()


@dataclass(slots=True)
class Turn:
    """What one side did in its rounds."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)  # of all threads
    deferred: int = 0


def bench(report: Report) -> None:
    """Free rows against held ones."""
    report.section(f"Structured output: {ROWS} rows of the demo, {ROW_TOKENS} tokens each, sampled")
    budget = Budget(0.0, 2, 2) if report.quick else Budget(60.0, 6, 24)
    free: list[Grammar | None] = [None] * ROWS
    sides: dict[str, list[Grammar | None]] = {
        "free": free,
        "1 held": [LONG, *free[1:]],
        "all held": [LONG] * ROWS,
        "1 slow to follow": [SLOW, *free[1:]],
    }
    turns = {name: Turn() for name in sides}
    with _demo(report.dtype) as engine:
        for grammars in sides.values():
            _decode(engine, grammars)  # strategies are timed, grammars compiled
        for number in budget.rounds():
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            for name in order:
                _note_turn(engine, sides[name], turns[name])
    case = f"{ROWS} rows"
    rate = (ROWS - 1) * ROW_TOKENS / statistics.median(turns["free"].wall_s)
    report.add(Figure("structured", case, "free", rate, unit="tokens/s"))
    for name, goal in GOALS.items():
        turn = turns[name]
        compared = [("by the clock", turns["free"].wall_s, turn.wall_s)]
        if "slow" not in name:  # which may have all that others leave
            compared.append(("by processor time", turns["free"].processor_s, turn.processor_s))
        for what, of_free, of_side in compared:
            ratios = [one / other for one, other in zip(of_free, of_side, strict=True)]
            figure = ratio_of(ratios, min(of_free) / min(of_side))
            note = f"{turn.deferred} tokens a step later"
            report.add(
                Figure("structured", case, f"{name}, {what}", figure, at_least=goal, note=note)
            )


@contextmanager
def _demo(dtype: DTypeName) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="hira-bench-") as temporary:
        folder = Path(temporary)
        engine = Engine.build(
            EngineOptions(
                base=str(BASE_DIR),
                store_dir=folder / "store",
                cache_dir=folder / "cache",
                dtype=dtype,
                device="cpu",
                threads=THREADS,
            )
        )
        try:
            yield engine
        finally:
            engine.close()


def _note_turn(engine: Engine, grammars: list[Grammar | None], turn: Turn) -> None:
    deferred = engine.snapshot().grammars.get("deferred_tokens", 0)
    wall, processor = _decode(engine, grammars)
    turn.wall_s.append(wall)
    turn.processor_s.append(processor)
    turn.deferred += int(engine.snapshot().grammars.get("deferred_tokens", 0) - deferred)


def _decode(engine: Engine, grammars: list[Grammar | None]) -> tuple[float, float]:
    """Seconds, of the clock and of processors, until all rows but the first have ended.

    The first is the one that may be slow to follow: it is cancelled then.
    """
    names = [f"row-{next(_numbers)}" for _ in grammars]
    requests = [
        GenerateRequest(
            id=name,
            adapter=None,
            version=None,
            token_ids=engine.text.tokenize_prompt(PROMPT, max_new_tokens=ROW_TOKENS),
            sampling=SamplingOptions(
                max_new_tokens=ROW_TOKENS,
                ignore_eos=True,
                do_sample=True,
                seed=at,
                grammar=grammar,
            ),
            stream=True,
            submitted=time.monotonic(),
        )
        for at, (name, grammar) in enumerate(zip(names, grammars, strict=True))
    ]
    began, used = time.perf_counter(), time.process_time()
    for one in requests:
        engine.submit(one)
    running = set(names)
    while running - {names[0]}:
        if not engine.has_work():
            engine.wait(1.0)
        for event in engine.step():
            raise_if_failed(event)
            if isinstance(event, TERMINAL):
                running.discard(event.id)
    took = time.perf_counter() - began, time.process_time() - used
    for name in running:
        engine.submit(Cancel(name))
    return took
