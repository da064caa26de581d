"""A thousand adapters on one engine: what it costs to register them, to keep them, to change them.

Every engine here is in this process, without HTTP, on an NF4 Llama of width 512 with 8 layers;
requests are texts of 32 tokens to classify, from clients that each wait for their answer. Both
sides of a ratio alternate. Processor time (CPU) stands beside wall time: on a machine that others
use, too, it is what remains comparable. Under Zipf's traffic 16 adapters have slots; the others are
in host memory (host), or are read from disk each time (disk).
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters.registry.registry import Registry
from adapters.registry.store import Store
from loadtests.bench.runs import raise_if_failed
from loadtests.bench.stock import Source, Stock, request, serve, stocked, zipf
from loadtests.bench.timing import THREADS, Figure, Report, percentile, ratio_of
from server.engine.engine import Engine
from server.messages import Preload

SLOTS = 16
HOT = 8  # adapters of the traffic that Zipf's is held against
CLIENTS = 64
WARM_CLIENTS = 4
COLD = 100
_ROOM = COLD + 2 * WARM_CLIENTS  # slots of the engine that loads cold adapters beside warm ones
_COLD_SETS = 3  # taken in turn: by its next turn a set has left its slots for another


@dataclass(frozen=True, slots=True)
class _Size:
    """How much to measure."""

    adapters: int
    requests: int  # a round and side
    rounds: int
    windows: int  # of cold loads


@dataclass(slots=True)
class _Clocks:
    """Seconds of each side, round by round, by the wall and by the processors."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)

    def run(self, side: str, engine: Engine, versions: Sequence[str]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        serve(engine, versions, CLIENTS)
        self.wall.setdefault(side, []).append(time.perf_counter() - wall)
        self.processor.setdefault(side, []).append(time.process_time() - processor)

    def tell(self, report: Report, case: str, side: str, against: str, at_least: float) -> None:
        """How many times as fast ``side`` was as ``against``."""
        for clock, seconds in (("", self.wall), (" (CPU)", self.processor)):
            pairs = zip(seconds[side], seconds[against], strict=True)
            best = min(seconds[against]) / min(seconds[side])
            value = ratio_of([other / own for own, other in pairs], best)
            note = f"best {best:.2f}; {statistics.median(seconds[side]):.2f} s a round"
            goal = at_least if not clock else None
            what = f"speed of {against}{clock}"
            report.add(Figure("residency", case, what, value, at_least=goal, note=note))


def bench(report: Report) -> None:
    """Run all cases."""
    size = _Size(60, 64, 1, 1) if report.quick else _Size(1000, 256, 4, 6)
    report.section(f"Residency: {size.adapters} adapters, NF4, {report.dtype}, {THREADS} threads")
    torch.set_num_threads(THREADS)
    with stocked(size.adapters, report.dtype) as stock:
        _registrations(report, stock, size)
        _cold_bytes(report, stock)
        _zipf(report, stock, size)
        _working_set(report, stock, size)
        _loads_beside_traffic(report, stock, size)
        _loads_beside_traffic(report, stock, size, packed=False)


def _registrations(report: Report, stock: Stock, size: _Size) -> None:
    """The registry that has all of them against one that has ten, in turn."""
    source = Source(stock.root / "more", stock.signature)
    few = Registry(stock.root / "few.db", Store(stock.root / "few"))
    for number in range(10):
        few.register(f"few-{number}", source.write(number), stock.signature, source="bench")
    many = Registry(stock.root / "registry.db", Store(stock.root / "store"))
    seconds: dict[str, list[float]] = {"few": [], "many": []}
    sides = {"few": few, "many": many}
    for number in range(20 if size.rounds > 1 else 5):
        folder = source.write(size.adapters + number)
        for name in sorted(sides, reverse=bool(number % 2)):
            began = time.perf_counter()
            sides[name].register("one-more", folder, stock.signature, source="bench", replace=True)
            sides[name].resolve("one-more")
            seconds[name].append(time.perf_counter() - began)
    for registry in (few, many):
        registry.remove("one-more")
        registry.close()
    pairs = zip(seconds["many"], seconds["few"], strict=True)
    best = min(seconds["many"]) / min(seconds["few"])
    report.add(
        Figure(
            "residency",
            f"registration {size.adapters + 1}",
            "time of the 11th",
            ratio_of([one / other for one, other in pairs], best),
            at_most=1.5,
            note=f"{statistics.median(seconds['many']) * 1e3:.1f} ms, best ratio {best:.2f}; while "
            f"they came: {statistics.median(stock.seconds[5:15]) * 1e3:.1f} ms the 5th to 15th, "
            f"{statistics.median(stock.seconds[-10:]) * 1e3:.1f} ms the last ten",
        )
    )


def _cold_bytes(report: Report, stock: Stock) -> None:
    """Of a fresh process that reads the registry, as an HTTP process does; and of a worker that
    has been told of the versions."""
    command = [sys.executable, "-m", "loadtests.bench.cold", str(stock.root)]
    found: Mapping[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    for process, count in found.items():
        note = "resident growth, by adapter"
        report.add(
            Figure(
                "residency",
                f"never asked for: {process}",
                "memory of an adapter",
                count / 1e3,
                unit="kB",
                at_most=20.0,
                note=note,
            )
        )


def _zipf(report: Report, stock: Stock, size: _Size) -> None:
    hot = [stock.versions[n % HOT] for n in range(size.requests)]
    clocks = _Clocks()
    with ExitStack() as stack:
        few, host, disk = (
            stack.enter_context(closing(stock.engine(slots=SLOTS, **more)))
            for more in ({}, {}, {"host_bytes": 0})
        )
        serve(few, hot[: 2 * HOT], CLIENTS)
        serve(host, stock.versions, CLIENTS)  # each has been asked for once: none is read again
        gc.collect()
        fifth = len(stock.versions) // 5
        serve(disk, stock.versions[:fifth], CLIENTS)
        before = _resident_bytes()
        serve(disk, stock.versions[fifth:], CLIENTS)
        gc.collect()
        growth = (_resident_bytes() - before) / (len(stock.versions) - fifth)
        loads: list[int] = []
        for number in range(size.rounds):
            drawn = zipf(stock.versions, size.requests, number)
            already = disk.snapshot().totals["load"]
            sides = {
                f"{HOT} adapters": (few, hot),
                "host": (host, drawn),
                "disk": (disk, drawn),
            }
            names = list(sides)
            for name in names[number % 3 :] + names[: number % 3]:
                clocks.run(name, *sides[name])
            loads.append(disk.snapshot().totals["load"] - already)
        _resident_adapter(report, few)
    report.add(
        Figure(
            "residency",
            "evicted: worker",
            "memory of an adapter",
            growth / 1e3,
            unit="kB",
            at_most=20.0,
            note="resident growth over the last four fifths",
        )
    )
    case = f"Zipf of {len(stock.versions)}, {SLOTS} slots"
    clocks.tell(report, f"{case}, host", "host", f"{HOT} adapters", 0.8)
    clocks.tell(report, f"{case}, disk", "disk", f"{HOT} adapters", 0.9)
    print(f"    loads from disk a round of {size.requests}: {statistics.median(loads):.0f}")


def _resident_adapter(report: Report, engine: Engine) -> None:
    snapshot = engine.snapshot()
    layers = list(engine.base.adapted.layers.values())
    slots = {slot for layer in layers for slot in layer.slots}
    tensors = sum(
        entry.a.numel() * entry.a.itemsize + entry.b.numel() * entry.b.itemsize
        for layer in layers
        for entry in layer.slots.values()
    )
    linear = [layer for layer in layers if getattr(layer, "quantized", None) is not None]
    inner = [one for one in linear if one.layer_signature.path != "lm_head"]
    weights = sum(
        one.layer_signature.in_features * one.layer_signature.out_features for one in inner
    )

    def add(what: str, value: float, at_most: float, **more: Any) -> None:
        case = f"{len(slots)} resident adapters"
        report.add(Figure("residency", case, what, value, at_most=at_most, **more))

    add("bytes of their tensors", snapshot.adapter_bytes["device"] / tensors, 1.05)
    per = snapshot.base_bytes["linear"] / weights
    add("base, linear layers", per, 0.57, unit="bytes/weight")


def _working_set(report: Report, stock: Stock, size: _Size) -> None:
    """Uniform traffic on four times as many adapters as the device's bytes hold."""
    few, many = stock.versions[:SLOTS], stock.versions[: 4 * SLOTS]
    one = _adapter_bytes(stock)
    clocks = _Clocks()
    with ExitStack() as stack:
        fits, spills = (
            stack.enter_context(closing(stock.engine(device_bytes=SLOTS * one))) for _ in range(2)
        )
        serve(fits, few, CLIENTS)
        serve(spills, many, CLIENTS)
        for number in range(size.rounds):
            sides = {
                "a set that fits": (fits, [few[n % len(few)] for n in range(size.requests)]),
                "spills": (spills, [many[n % len(many)] for n in range(size.requests)]),
            }
            for name in sorted(sides, reverse=bool(number % 2)):
                clocks.run(name, *sides[name])
    clocks.tell(report, "working set of 4x the device", "spills", "a set that fits", 0.5)


def _adapter_bytes(stock: Stock) -> int:
    with closing(stock.engine()) as engine:
        serve(engine, stock.versions[:1], 1)
        return engine.snapshot().adapter_bytes["device"]


def _loads_beside_traffic(
    report: Report, stock: Stock, size: _Size, *, packed: bool = True
) -> None:
    """Latency of warm adapters while cold ones are read from disk, against as many answers in
    quiet; the cold ones from packed files, or as at their first load."""
    warm = stock.versions[:WARM_CLIENTS]
    sets = max(1, min(_COLD_SETS, (len(stock.versions) - WARM_CLIENTS) // COLD))
    loaded: list[float] = []
    quiet: list[float] = []
    ratios: list[float] = []
    seconds: list[float] = []
    options = {} if packed else {"packed_bytes": 0}
    with closing(stock.engine(slots=_ROOM, host_bytes=0, **options)) as engine:
        serve(engine, list(warm) * 8, WARM_CLIENTS)
        for number in range(size.windows):
            start = WARM_CLIENTS + (number % sets) * COLD
            cold = stock.versions[start : start + COLD]
            during, took = _window(engine, warm, cold)
            after = serve(engine, [warm[n % len(warm)] for n in range(len(during))], WARM_CLIENTS)
            loaded += during
            quiet += after
            seconds.append(took)
            ratios.append(percentile(during, 0.99) / percentile(after, 0.99))
        ready_made = engine.snapshot().totals["ready_made"]
    case = f"{WARM_CLIENTS} warm clients, {COLD} {'cold' if packed else 'first'} loads"
    for share, goal in ((0.5, None), (0.99, 1.1 if packed else None)):
        value = percentile(loaded, share) / percentile(quiet, share)
        note = (
            f"{percentile(loaded, share) * 1e3:.1f} against {percentile(quiet, share) * 1e3:.1f} ms"
            f" of {len(loaded)} answers each"
        )
        what = f"p{share * 100:g} of a quiet time"
        report.add(Figure("residency", case, what, value, at_most=goal, note=note))
    note = f"a set of loads took {statistics.median(seconds):.2f} s; {ready_made} packed"
    value_of_rounds = ratio_of(ratios)
    report.add(
        Figure("residency", case, "p99 of a quiet time, by window", value_of_rounds, note=note)
    )


def _window(engine: Engine, warm: Sequence[str], cold: Sequence[str]) -> tuple[list[float], float]:
    """Ask for ``cold`` at once and serve warm clients until all of it is on the device.

    Returns:
        Seconds of each answer, and of the window.
    """
    began = time.perf_counter()
    for version in cold:
        engine.submit(Preload(version))
    waiting: dict[str, float] = {}
    latencies: list[float] = []
    number = 0

    def ask() -> None:
        nonlocal number
        one = request(warm[number % len(warm)], number)
        number += 1
        engine.submit(one)
        waiting[one.id] = time.perf_counter()

    for _ in range(WARM_CLIENTS):
        ask()
    took = 0.0
    while waiting:
        for event in engine.step():
            raise_if_failed(event)
            latencies.append(time.perf_counter() - waiting.pop(event.id))
            if not took:
                ask()
        if took:
            continue
        states = {version: engine.residency.state(version) for version in cold}
        for version, state in states.items():
            if state == "failed":
                raise SystemExit(f"{version} failed to load: {engine.residency.error(version)}")
        if all(state == "ready" for state in states.values()):
            took = time.perf_counter() - began
    return latencies, took


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
