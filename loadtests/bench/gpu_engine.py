"""Whole steps of the engine on random Llama shapes, decoding and prompts, against stock peers.

Every kind of decode steps is measured in one run, with the path of before as the first: dynamic
steps, the fused kernel alone, prompts by 1,024 tokens a step. Ratios stand in that run alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch

from loadtests.bench.gpu_bases import Shape, StoredBase, random_llama, stored
from loadtests.bench.gpu_http import measure_http
from loadtests.bench.gpu_peers import FIRST_TOKENS, generate_s, step_s, with_one_adapter
from loadtests.bench.gpu_swaps import measure_swaps
from loadtests.bench.part_clock import PartClock
from loadtests.bench.peers import prepare_for_peft
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import Figure, Report
from server.engine.engine import Engine
from server.messages import GenerateRequest, SamplingOptions
from server.options import DecodeSteps, EngineOptions

_MORE_ADAPTERS = 4  # than slots: so many are elsewhere while adapters are swapped
_EARLIER_PREFILL_TOKENS = 1024
_LOAD_S = 12.0  # an engine's start, of a large base with the captures of its steps; the server's
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class StepKind:
    """How an engine runs.

    Args:
        name: In the report.
        steps: Its ``decode_steps``.
        is_earlier: As the engine was before it had anything else.
    """

    name: str
    steps: DecodeSteps
    is_earlier: bool = False


EARLIER: Final = StepKind("earlier", "dynamic", is_earlier=True)
DYNAMIC: Final = StepKind("dynamic", "dynamic")
STATIC: Final = StepKind("static", "static")
AHEAD: Final = StepKind("ahead", "ahead")
# The most telling first: what does not fit into the time is left out from the end.
SMALL_KINDS: Final = (EARLIER, AHEAD, STATIC, DYNAMIC)
LARGE_KINDS: Final = (EARLIER, AHEAD)


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of everything.

    Args:
        adapters: And sequences of a usual step.
        more_tokens: Of each sequence, once it has its first ones.
        vocabulary: Of the base.
        prompt_tokens: Of prompts that are read.
        swaps: Adapters loaded while others decode.
        clients: Of the server.
        rounds: Of each time, of which the best counts.
    """

    adapters: int = 16
    more_tokens: int = 24
    vocabulary: int = 128_256
    prompt_tokens: int = 512
    swaps: int = 1000
    clients: tuple[int, ...] = (1, 16, 64)
    rounds: int = 2


@dataclass(slots=True)
class ShapeTimes:
    """What of one shape later figures are held against, by case: seconds of a step, of prompts."""

    peers: dict[str, float] = field(default_factory=dict)
    earlier: dict[str, float] = field(default_factory=dict)


@contextmanager
def engine_on(
    made: StoredBase, shape: Shape, device: torch.device, kind: StepKind, slots: int
) -> Iterator[Engine]:
    """The engine on what is stored."""
    on_card = device.type == "cuda"
    engine = Engine.build(
        EngineOptions(
            base=str(made.base),
            store_dir=made.root / "store",
            cache_dir=made.root / f"cache-{kind.name}",
            dtype="bf16",
            device="cuda" if on_card else "cpu",
            modulation="fused" if kind.is_earlier and on_card else "auto",
            decode_steps=kind.steps,
            prefill_tokens=_EARLIER_PREFILL_TOKENS if kind.is_earlier else None,
            kv_bytes=shape.kv_bytes,
            device_bytes=8 << 30 if on_card else 1 << 30,
            max_sequences=shape.max_sequences,
            slots=slots,
            threads=torch.get_num_threads(),
        )
    )
    try:
        yield engine
    finally:
        engine.close()


def seconds_of(
    engine: Engine, versions: Sequence[str | None], new_tokens: int, prompt_tokens: int = 32
) -> float:
    """One request for each of ``versions``, all at once, to the end of the last.

    Raises:
        SystemExit: A request failed.
    """
    vocabulary = engine.base.adapted.signature.vocab_size
    requests = [
        GenerateRequest(
            id=f"gpu-{next(_numbers)}",
            adapter=version,
            version=version,
            token_ids=tuple((i * 37 + j * 11) % (vocabulary - 5) + 5 for j in range(prompt_tokens)),
            sampling=SamplingOptions(max_new_tokens=new_tokens, ignore_eos=True),
            submitted=time.monotonic(),
        )
        for i, version in enumerate(versions)
    ]
    began = time.perf_counter()
    run_to_end(engine, requests)
    return time.perf_counter() - began


def measure_engine(
    report: Report,
    shape: Shape,
    device: torch.device,
    amounts: Amounts,
    *,
    clock: PartClock,
    kinds: Sequence[StepKind] = SMALL_KINDS,
) -> None:
    """Peers, all kinds of steps and prompts of one shape; with ``ahead`` swaps and the server, too.

    Args:
        report: Gets the figures.
        shape: Of the base.
        device: Where all of it runs.
        amounts: How much.
        clock: What does not fit is left out.
        kinds: Of engines.
    """
    times = ShapeTimes()
    model = random_llama(shape, device, amounts.vocabulary)
    if clock.has_time(f"{shape.name}: dense model"):
        _add_generate(
            report, shape, "generate on dense bf16", model,
            rows=amounts.adapters, amounts=amounts,
        )  # fmt: skip
    more = _MORE_ADAPTERS if amounts.swaps else 0
    adapters = amounts.adapters + more
    with stored(model, shape, device, adapters=adapters, few_rank=amounts.adapters) as made:
        # What is written is not what bitsandbytes makes of it in its forward on a processor.
        prepare_for_peft(model)
        for rows in dict.fromkeys((amounts.adapters, 1, shape.max_sequences)):
            if clock.has_time(f"{shape.name}: bitsandbytes, batch of {rows}"):
                what = "generate on bitsandbytes"
                times.peers[_decoding(rows, 0)] = _add_generate(
                    report, shape, what, model, rows=rows, amounts=amounts
                )
        if clock.has_time(f"{shape.name}: prompts on bitsandbytes"):
            rows = min(8, amounts.adapters)
            generate_s(model, rows, 1, amounts.prompt_tokens)
            seconds = generate_s(model, rows, 1, amounts.prompt_tokens)
            case = f"{shape.name}, {_prompts(rows, amounts)}, bare base"
            rate = rows * amounts.prompt_tokens / seconds
            report.add(Figure("gpu", case, "generate on bitsandbytes", rate, unit="tokens/s"))
        if clock.has_time(f"{shape.name}: PEFT"):
            wrapped = with_one_adapter(model, made.folders[0])
            step = step_s(partial(generate_s, wrapped, 1), amounts.more_tokens, 1)
            report.add(Figure("gpu", f"{shape.name}, 1 request", "PEFT", 1 / step, unit="tokens/s"))
            del wrapped
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for kind in kinds:
            if not clock.has_time(f"{shape.name}: {kind.name} steps", _LOAD_S):
                continue
            with engine_on(made, shape, device, kind, amounts.adapters) as engine:
                _steps(
                    report,
                    shape,
                    engine,
                    made,
                    amounts=amounts,
                    clock=clock,
                    kind=kind,
                    times=times,
                )
                if kind == AHEAD and amounts.swaps and clock.has_time(f"{shape.name}: swaps"):
                    measure_swaps(
                        report, shape.name, engine, made.versions, swaps=amounts.swaps, clock=clock
                    )
            if kind == AHEAD and amounts.clients and clock.has_time(f"{shape.name}: HTTP", _LOAD_S):
                measure_http(
                    report, shape.name, made, amounts.adapters, device=device, steps=kind.steps,
                    new_tokens=amounts.more_tokens, clients=amounts.clients,
                    kv_bytes=shape.kv_bytes, clock=clock,
                )  # fmt: skip


def _steps(
    report: Report,
    shape: Shape,
    engine: Engine,
    made: StoredBase,
    *,
    amounts: Amounts,
    clock: PartClock,
    kind: StepKind,
    times: ShapeTimes,
) -> None:
    """All cases of one engine, and its ratios where it is the one that is asked something of."""
    adapters, goals = amounts.adapters, shape.goals
    own = made.versions[:adapters]
    usual, many, one = (_decoding(n, min(n, adapters)) for n in (adapters, shape.max_sequences, 1))
    bare, few = _decoding(adapters, 0), f"{_decoding(adapters, adapters)} of rank 8"
    cases: dict[str, Sequence[str | None]] = {
        usual: own,
        bare: [None] * adapters,
        many: [own[i % adapters] for i in range(shape.max_sequences)],
        one: own[:1],
        few: made.few_rank,
    }
    asked = kind == AHEAD
    steps: dict[str, float] = {}

    def add_speed(
        case: str, what: str, other: dict[str, float], than: str, goal: float | None
    ) -> None:
        if case in steps and than in other:
            speed = other[than] / steps[case]
            report.add(
                Figure(
                    "gpu", f"{shape.name}, {case}", what, speed, at_least=goal if asked else None
                )
            )

    for case, versions in cases.items():
        if case == few and kind.is_earlier:
            continue
        if not clock.has_time(f"{shape.name}, {case}, {kind.name} steps"):
            continue
        run = partial(seconds_of, engine, versions)
        steps[case] = step_s(run, amounts.more_tokens, amounts.rounds)
        note = f"{len(versions) / steps[case]:.0f} tokens/s"
        report.add(
            Figure(
                "gpu", f"{shape.name}, {case}", f"{kind.name} steps", steps[case] * 1e3,
                unit="ms", note=note,
            )
        )  # fmt: skip
        if case == usual and engine.base.device.type == "cuda":
            busy = busy_share(run, amounts.more_tokens, steps[case], cuda_kernels_s)
            what, goal = f"card busy, {kind.name} steps", goals.busy if asked else None
            report.add(
                Figure("gpu", f"{shape.name}, {case}", what, busy, "of a step", at_least=goal)
            )
    if kind.is_earlier:
        times.earlier |= steps
    else:
        against = f"{kind.name} against earlier steps"
        for case, goal in ((usual, goals.usual), (many, goals.many), (one, goals.one)):
            add_speed(case, against, times.earlier, case, goal)
        what = f"{kind.name} against generate on bitsandbytes"
        add_speed(usual, what, times.peers, bare, goals.generate)
        for case, goal in ((usual, goals.adapters), (few, goals.few_rank)):
            add_speed(case, f"{kind.name} against the bare base in this engine", steps, bare, goal)
    _read_prompts(report, shape, engine, own, amounts=amounts, clock=clock, kind=kind, times=times)


def _read_prompts(
    report: Report,
    shape: Shape,
    engine: Engine,
    versions: Sequence[str],
    *,
    amounts: Amounts,
    clock: PartClock,
    kind: StepKind,
    times: ShapeTimes,
) -> None:
    some = versions[:8]
    case = f"{_prompts(len(some), amounts)}, {len(some)} adapters"
    if not clock.has_time(f"{shape.name}, {case}, {kind.name} steps"):
        return
    # Forms of the kernels are timed at first, a few in each forward.
    for _ in range(2 * amounts.rounds):
        seconds_of(engine, some, 1, amounts.prompt_tokens)
    seconds = min(seconds_of(engine, some, 1, amounts.prompt_tokens) for _ in range(amounts.rounds))
    named, rate = f"{shape.name}, {case}", len(some) * amounts.prompt_tokens / seconds
    report.add(Figure("gpu", named, f"{kind.name} steps", rate, unit="tokens/s"))
    if kind.is_earlier:
        times.earlier[case] = seconds
    elif case in times.earlier:
        goal = shape.goals.prompts if kind == AHEAD else None
        what = f"{kind.name} against earlier steps"
        report.add(Figure("gpu", named, what, times.earlier[case] / seconds, at_least=goal))


def busy_share(
    run: Callable[[int], float],
    more_tokens: int,
    step: float,
    kernels_s: Callable[[Callable[[], object]], float],
) -> float:
    """Share of a step in which kernels ran.

    Args:
        run: Requests with so many new tokens each.
        more_tokens: Beyond the first few, which are prompts.
        step: Seconds of a step, measured without a profiler.
        kernels_s: Seconds of kernels in a call.
    """
    short, long = (
        kernels_s(partial(run, tokens)) for tokens in (FIRST_TOKENS, FIRST_TOKENS + more_tokens)
    )
    return (long - short) / more_tokens / step


def cuda_kernels_s(run: Callable[[], object]) -> float:
    """Seconds that kernels and copies took of the card, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return float(sum(one.self_device_time_total for one in seen.events())) / 1e6


def _add_generate(
    report: Report, shape: Shape, what: str, model: object, *, rows: int, amounts: Amounts
) -> float:
    """Report and return the seconds of a step of transformers' ``generate``."""
    step = step_s(partial(generate_s, model, rows), amounts.more_tokens, amounts.rounds)
    note = f"{rows / step:.0f} tokens/s"
    case = f"{shape.name}, {_decoding(rows, 0)}"
    report.add(Figure("gpu", case, what, step * 1e3, unit="ms", note=note))
    return step


def _decoding(sequences: int, adapters: int) -> str:
    on = f"{adapters} adapter{'s' * (adapters > 1)}" if adapters else "bare base"
    return f"{sequences} sequence{'s' * (sequences > 1)}, {on}"


def _prompts(count: int, amounts: Amounts) -> str:
    return f"{count} prompts of {amounts.prompt_tokens}"
