"""Times sides in turn, so that a slow moment of the machine falls on all of them.

A ratio is the median of the ratios of single rounds, with its quartiles as the spread. The best
time of each side is kept beside it: it is what the machine does when nothing else runs.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

THREADS = 2
_SHORTEST_SAMPLE_S = 0.05
DTypeName = Literal["bf16", "fp32"]
_DTYPES: Mapping[DTypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "litserve")


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to measure one case."""

    seconds: float
    fewest_rounds: int
    most_rounds: int

    def rounds(self) -> Iterator[int]:
        """Numbers of rounds, until the time is used or there are enough."""
        began = time.perf_counter()
        for number in range(self.most_rounds):
            if number >= self.fewest_rounds and time.perf_counter() - began > self.seconds:
                return
            yield number


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median with its quartiles, over ``rounds`` rounds; ``best`` is of the best times."""

    median: float
    low: float
    high: float
    best: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds a call, by side, one per round."""

    seconds: Mapping[str, Sequence[float]]

    def best(self, side: str) -> float:
        return min(self.seconds[side])

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def speed(self, side: str, against: str) -> Ratio:
        """How many times as fast ``side`` is as ``against``."""
        pairs = zip(self.seconds[side], self.seconds[against], strict=True)
        return ratio_of([other / own for own, other in pairs], self.best(against) / self.best(side))

    def latency(self, side: str, against: str) -> Ratio:
        """How many times the time of ``against`` ``side`` takes."""
        return self.speed(against, side)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report: a ratio, or a plain value, and what it should be."""

    bench: str
    case: str
    what: str
    value: float | Ratio
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def number(self) -> float:
        return self.value.median if isinstance(self.value, Ratio) else self.value

    @property
    def reached(self) -> bool | None:
        """Whether it is what it should be; None where nothing is asked of it."""
        if self.at_least is None and self.at_most is None:
            return None
        enough = self.at_least is None or self.number >= self.at_least
        return enough and (self.at_most is None or self.number <= self.at_most)


@dataclass(slots=True)
class Report:
    """Prints figures as they come and keeps them for the JSON file."""

    machine: Mapping[str, Any]
    quick: bool
    one_thread: bool = False
    dtype: DTypeName = "bf16"
    figures: list[Figure] = field(default_factory=list)
    dry_run: bool = False
    left_out: list[str] = field(default_factory=list)  # what was to be measured and was not, why

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the sides compute in."""
        return _DTYPES[self.dtype]

    @property
    def threads(self) -> int:
        """Of the benches that run in this process alone."""
        return 1 if self.one_thread else THREADS

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds: of the clock, or of the processor time of the one thread."""
        return time.thread_time if self.one_thread else time.perf_counter

    def section(self, title: str) -> None:
        print(f"\n{title}\n{'-' * len(title)}", flush=True)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(_line(figure), flush=True)

    def leave_out(self, what: str) -> None:
        """Say what is not measured, and why."""
        self.left_out.append(what)
        print(f"left out: {what}", flush=True)

    def as_markdown(self) -> str:
        """The figures as tables, those that something is asked of first; above them the machine."""
        from loadtests.bench.report_tables import as_page

        return as_page(self.as_json())

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(one), "reached": one.reached} for one in self.figures]
        return {
            "machine": dict(self.machine),
            "quick": self.quick,
            "dry run": self.dry_run,
            "figures": rows,
            "left out": self.left_out,
        }


def alternate(
    sides: Mapping[str, Callable[[], object]],
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time every side once a round by ``clock``; which one begins changes from round to round.

    A side that takes less than a twentieth of a second is called several times for one sample.
    """
    repeats: dict[str, int] = {}
    for name, side in sides.items():
        seconds = _timed(side, 1, clock)
        if seconds < _SHORTEST_SAMPLE_S:  # that was the warm-up
            seconds = _timed(side, 1, clock)
        repeats[name] = max(1, math.ceil(_SHORTEST_SAMPLE_S / seconds))
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for number in budget.rounds():
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(_timed(sides[name], repeats[name], clock))
    return Samples(found)


def ratio_of(values: Sequence[float], best: float | None = None) -> Ratio:
    """The median of ``values`` with their quartiles."""
    low, high = min(values), max(values)
    if len(values) > 3:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    middle = statistics.median(values)
    return Ratio(middle, low, high, middle if best is None else best, len(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    from adapters.kernels import native_ops
    from adapters.modulation.autotune import processor

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(one, 2) for one in os.getloadavg()],
        "threads": THREADS,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "bf16": {
            "avx512": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "torch's own": torch.backends.cpu.get_cpu_capability(),
        "compiled kernel": {
            "bf16": native_ops.instruction_set(torch.bfloat16) or "none",
            "fp32": native_ops.instruction_set(torch.float32) or "none",
        },
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_PACKAGES, "kernels")},
    }


def dtype_of(name: Literal["auto", "bf16", "fp32"]) -> DTypeName:
    """What to compute in; ``auto``: what a server on this processor takes by itself."""
    if name != "auto":
        return name
    from server.base.load import choose_dtype
    from server.options import EngineOptions

    found = choose_dtype(
        EngineOptions(base="", store_dir=Path(), cache_dir=Path()), torch.device("cpu")
    )
    return "bf16" if found == torch.bfloat16 else "fp32"


def print_machine(known: Mapping[str, Any]) -> None:
    for name, value in known.items():
        inner = value.items() if isinstance(value, Mapping) else None
        text = ", ".join(f"{a} {b}" for a, b in inner) if inner is not None else str(value)
        print(f"{name:<16} {text}")
    if known["load"][0] > 0.5:
        print("note: the machine was not idle at the start; ratios may suffer from it")


def _timed(side: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(repeats):
        side()
    return (clock() - began) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _line(figure: Figure) -> str:
    value = figure.value
    if isinstance(value, Ratio):
        shown = f"{value.median:8.3g} {figure.unit:<9}"
        spread = f"[{value.low:.3g} .. {value.high:.3g}], n = {value.rounds}"
    else:
        shown, spread = f"{value:8.4g} {figure.unit:<9}", ""
    goal = ""
    if figure.at_least is not None:
        goal = f">= {figure.at_least:g}"
    elif figure.at_most is not None:
        goal = f"<= {figure.at_most:g}"
    verdict = {None: "", True: "reached", False: "MISSED"}[figure.reached]
    line = f"{figure.case:<34}{figure.what:<34}{shown}{spread:<27}{goal:<8}{verdict:<8}"
    return f"{line}{figure.note}".rstrip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
