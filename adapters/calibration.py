"""Measures the coefficients of ``adapters.costs`` on the machine at hand, once.

A few probes for every shape class of the model, a tenth of a second or so for each, on random
weights no larger than half a million. On a CPU they run in one thread and are measured in its own
processor time, so what else runs on the machine at the start does not count; what threads share
among them is divided by their number afterwards. What was found is kept in a file that names the
machine, the threads and the versions it holds for; with another, or one that cannot be read, it is
measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from adapters import native_path
from adapters.costs import UNMEASURED, Backend, CostModel, Costs, ShapeClass
from adapters.inject import AdaptedModel
from adapters.kernels import native_ops, torch_ops
from adapters.layers import AdaptedLinear
from adapters.quant import QuantizedWeight, WeightKind
from adapters.segments import from_runs
from adapters.slot_factors import SlotFactors
from adapters.torch_path import Sources, Work, run_into
from adapters.workspace import Workspace

_log = logging.getLogger(__name__)

_FORMAT = 1
_ROUNDS = 5
_PATIENCE_S = 2.0  # after which no further round begins
_FEWEST_WEIGHTS = 1 << 14  # of a layer: below, every strategy takes microseconds
_MOST_WEIGHTS = 1 << 19  # of a probe: costs are per weight, so larger ones tell nothing new
_MOST_CLASSES = 6
# Kept weights are read from memory: together they are larger than a cache of the processor.
_RING_WEIGHTS = 24 << 20
_RING_SEGMENTS = 64
_LOW_RANK, _RANK, _HIGH_RANK = 8, 32, 64
_SEGMENTS = 3

Probe = Callable[[], object]


def calibrate(adapted: AdaptedModel, dtype: torch.dtype, folder: Path | None = None) -> CostModel:
    """The costs of this model's linear layers, as kept in ``folder`` or measured now.

    Whatever goes wrong with the file is logged and costs a new measurement; what goes wrong with a
    measurement is logged and leaves the built-in costs, with which every answer is the same.

    Args:
        adapted: Its layers tell the shapes and the storage; nothing of it changes.
        dtype: The compute dtype.
        folder: Where the file is; None to measure and keep nothing.
    """
    wanted = _shapes(adapted)
    if not wanted:
        return UNMEASURED
    machine = _machine(adapted.device, dtype, sorted({kind for _, kind in wanted.values()}))
    path = None
    table: dict[ShapeClass, dict[Backend, Costs]] = {}
    if folder is not None:
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        path = folder / f"costs-{digest[:16]}.json"
        table = _read(path, machine)
    missing = {key: one for key, one in wanted.items() if key not in table}
    if not missing:
        return CostModel(table)
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            for key, (shape, kind) in missing.items():
                table[key] = _measure(shape, kind, dtype, adapted.device)
    except (RuntimeError, ValueError) as error:
        _log.warning("The strategies could not be measured (%s): built-in costs are used.", error)
        return UNMEASURED
    took_s = time.perf_counter() - began
    _log.info("Measured the strategies for %d shapes in %.2f s.", len(missing), took_s)
    if path is not None:
        _write(path, machine, table)
    return CostModel(table)


def _shapes(adapted: AdaptedModel) -> dict[ShapeClass, tuple[tuple[int, int], WeightKind]]:
    """For each class, the shape to measure; those of most layers first, if there are too many."""
    found: dict[ShapeClass, tuple[tuple[int, int], WeightKind]] = {}
    counts: dict[ShapeClass, int] = {}
    for layer in adapted.layers.values():
        if isinstance(layer, AdaptedLinear) and not layer.is_output:
            weight = layer.quantized
            if weight.shape[0] * weight.shape[1] < _FEWEST_WEIGHTS:
                continue
            key = ShapeClass.of(weight.shape)
            counts[key] = counts.get(key, 0) + 1
            found.setdefault(key, (weight.shape, weight.kind))
    often = sorted(found, key=lambda key: (-counts[key], key))[:_MOST_CLASSES]
    return {key: found[key] for key in sorted(often)}


def _machine(device: torch.device, dtype: torch.dtype, kinds: list[str]) -> dict[str, Any]:
    """All that the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernel": native_ops.digest(),
        "dtype": str(dtype),
        "storage": ",".join(kinds),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path, machine: Mapping[str, Any]) -> dict[ShapeClass, dict[Backend, Costs]]:
    """What the file holds for this machine; nothing if there is none, or it cannot be used."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != _FORMAT or held["machine"] != machine:
            raise ValueError("it is of another machine or version")
        table: dict[ShapeClass, dict[Backend, Costs]] = {}
        for text, backends in held["costs"].items():
            first, second = (int(part) for part in text.split(","))
            table[ShapeClass(first, second)] = {
                backend: _costs_of(backends[backend])
                for backend in _backends()
                if backend in backends or backend == "torch"
            }
        return table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be used (%s): the strategies are measured anew.", path, error)
        return {}


def _costs_of(values: Mapping[str, Any]) -> Costs:
    """Raises ValueError, KeyError or TypeError unless they are all there and sensible."""
    if set(values) != {field.name for field in fields(Costs)}:
        raise ValueError("its fields are others")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is no number")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
    whole = {name: int(values[name]) for name in ("granule", "lone_rows")}
    if whole["granule"] < 1:
        raise ValueError("granule is below 1")
    return Costs(**{name: float(value) for name, value in values.items()} | whole)  # type: ignore[arg-type]


def _backends() -> tuple[Backend, ...]:
    return ("native", "torch")


def _write(
    path: Path, machine: Mapping[str, Any], table: Mapping[ShapeClass, Mapping[Backend, Costs]]
) -> None:
    costs = {
        f"{key.weights_log2},{key.inputs_log2}": {name: asdict(one) for name, one in own.items()}
        for key, own in table.items()
    }
    text = json.dumps({"format": _FORMAT, "machine": machine, "costs": costs}, indent=1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        _log.warning("%s cannot be written (%s): the next start measures again.", path, error)


def _measure(
    shape: tuple[int, int], kind: WeightKind, dtype: torch.dtype, device: torch.device
) -> dict[Backend, Costs]:
    out_features = min(shape[0], max(64, _MOST_WEIGHTS // shape[1]))
    bench = _Bench((out_features, shape[1]), kind, dtype, device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    try:
        if threads > 1:
            torch.set_num_threads(1)
        times = bench.run()
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
    share = bench.memory_share(times, threads)
    found: dict[Backend, Costs] = {"torch": _shared(bench.torch_costs(times), threads, share)}
    if bench.has_native:
        found["native"] = _shared(bench.native_costs(times), threads, share)
    return found


def _shared(costs: Costs, threads: int, memory_share: float) -> Costs:
    """What one thread takes, shared among ``threads``: all but the calls themselves."""
    divided = {
        field.name: getattr(costs, field.name) / threads
        for field in fields(Costs)
        if field.name not in {"call_ns", "segment_ns", "kept", "granule", "lone_rows"}
    }
    return replace(costs, **divided, kept=costs.kept * memory_share)


class _Bench:
    """The probes for one shape, and how costs follow from their times."""

    def __init__(
        self, shape: tuple[int, int], kind: WeightKind, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        self.device = device
        self.count = shape[0] * shape[1]
        self.workspace = Workspace()
        self.weight = QuantizedWeight.from_dense(
            random(*shape), "none" if kind == "dense" else kind, double_quant=False
        )
        self.tiny = QuantizedWeight.from_dense(random(32, 32))
        self.x = random(128, shape[1])
        self.small = random(1, 32)
        self.factors = {
            rank: SlotFactors("hira", random(rank, shape[1]), random(shape[0], rank) * 0.01)
            for rank in (_LOW_RANK, _RANK, _HIGH_RANK)
        }
        self.dense = random(*shape)
        self.room = torch.empty_like(self.dense)
        self.segments = min(_RING_SEGMENTS, max(2, _RING_WEIGHTS // self.count))
        # Written, or all of it would be one and the same page.
        ring = torch.ones(self.segments * self.count, dtype=dtype, device=device)
        self.ring = ring.view(self.segments, *shape)
        self.has_native = native_path.takes(self.x, self.weight, None) and all(
            own.native_record for own in self.factors.values()
        )

    def run(self) -> dict[str, float]:
        """Nanoseconds of each probe, the least of some rounds."""
        probes = self._torch_probes()
        if self.has_native:
            probes |= self._native_probes()
        for probe in probes.values():
            probe()
        best = dict.fromkeys(probes, math.inf)
        end = time.perf_counter() + _PATIENCE_S
        for _ in range(_ROUNDS):
            for name, probe in probes.items():
                best[name] = min(best[name], self._time(probe))
            if time.perf_counter() > end:
                break
        return best

    def memory_share(self, times: Mapping[str, float], threads: int) -> float:
        """What part of the time to read kept weights remains when ``threads`` do.

        Between all of it, where one uses up the memory's bandwidth, and an equal share.
        """
        if not self.has_native or threads == 1:
            return 1 / threads
        probe = self._native_probes()["n kept"]
        best = math.inf
        for _ in range(_ROUNDS):
            began = time.perf_counter_ns()
            probe()
            best = min(best, float(time.perf_counter_ns() - began))
        return min(1.0, max(1 / threads, best / times["n kept"]))

    def _time(self, probe: Probe) -> float:
        """Nanoseconds: of this thread's processor time, or on another device as a clock has it."""
        if self.device.type == "cpu":
            began = time.thread_time_ns()
            probe()
            return float(time.thread_time_ns() - began)
        self._settle()
        began = time.perf_counter_ns()
        probe()
        self._settle()
        return float(time.perf_counter_ns() - began)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _native_probes(self) -> dict[str, Probe]:
        def modulated(rank: int, rows: int, way: bytes) -> Probe:
            record = self.factors[rank].native_record + way
            every = from_runs((slot, rows) for slot in range(_SEGMENTS))
            bounds = native_ops.pack_bounds(every)
            call = native_path.Call(every.rows, bounds, record * _SEGMENTS)
            return self._native(call)

        few = native_ops.lone_rows()
        kept = from_runs((slot, 1) for slot in range(self.segments))
        records = b"".join(native_ops.BARE + native_ops.as_kept(one) for one in self.ring)
        ring = native_path.Call(kept.rows, native_ops.pack_bounds(kept), records)
        tiny = native_path.Call.of_base(1)
        return {
            "n call": lambda: native_path.run(self.small, self.tiny, tiny, None, self.workspace),
            "n one": self._native(native_path.Call.of_base(1)),
            "n few": self._native(native_path.Call.of_base(few)),
            "n tile": self._native(native_path.Call.of_base(16)),
            "n many": self._native(native_path.Call.of_base(128)),
            "n fold low": modulated(_LOW_RANK, 16, native_ops.AS_FOLD),
            "n fold high": modulated(_HIGH_RANK, 16, native_ops.AS_FOLD),
            "n expand": modulated(_RANK, 1, native_ops.AS_EXPAND),
            "n kept": self._native(ring),
        }

    def _native(self, call: native_path.Call) -> Probe:
        x = self.x[: call.rows]
        return lambda: native_path.run(x, self.weight, call, None, self.workspace)

    def _torch_probes(self) -> dict[str, Probe]:
        def fold(rank: int, room: torch.Tensor | None = None) -> None:
            own = self.factors[rank]
            room = torch.empty_like(self.dense) if room is None else room
            torch_ops.fold_into(room, self.dense, own.a, own.b)

        def matmul(weight: torch.Tensor, rows: int) -> Probe:
            y = self.x.new_empty(rows, weight.shape[0])
            return lambda: torch_ops.linear_into(y, self.x[:rows], weight, None)

        tiny = self.tiny.dequantize(dtype=self.x.dtype)
        tiny_y = self.x.new_empty(1, 32)
        kept = cycle([matmul(one, 1) for one in self.ring])
        every = from_runs((slot, 1) for slot in range(_SEGMENTS))
        expand = [Work(part, "expand", None, self.factors[_RANK]) for part in every.parts]
        y = self.x.new_empty(_SEGMENTS, self.dense.shape[0])
        sources = Sources(lambda: self.dense, lambda _: self.room)
        return {
            "t call": lambda: torch_ops.linear_into(tiny_y, self.small, tiny, None),
            "t decode": lambda: self.workspace.dequantized(self.weight, self.x.dtype),
            "t tile": matmul(self.dense, 16),
            "t many": matmul(self.dense, 128),
            "t fold low": lambda: fold(_LOW_RANK, self.room),
            "t fold high": lambda: fold(_HIGH_RANK, self.room),
            "t expand": lambda: run_into(y, self.x[:_SEGMENTS], expand, sources, self.workspace),
            "t kept": lambda: [next(kept)() for _ in range(_SEGMENTS)],
            "fill": lambda: fold(_RANK),
        }

    def native_costs(self, times: Mapping[str, float]) -> Costs:
        n, few = self.count, native_ops.lone_rows()
        call = times["n call"]
        row = (times["n many"] - times["n tile"]) / 112 / n
        lone = (times["n few"] - times["n one"]) / max(1, few - 1) / n
        decode = (times["n one"] - call) / n - lone
        rank_steps = _SEGMENTS * (_HIGH_RANK - _LOW_RANK)
        fold_rank = (times["n fold high"] - times["n fold low"]) / rank_steps / n
        shared = decode + call / n
        fold = (times["n fold low"] / n - shared) / _SEGMENTS - 16 * row - _LOW_RANK * fold_rank
        expand = (times["n expand"] / n - shared) / _SEGMENTS / _RANK
        kept = (times["n kept"] - call) / self.segments / n - lone
        return Costs(
            call_ns=max(0.0, call), segment_ns=0.0, decode=max(0.0, decode), multiply=0.0,
            row=max(0.0, row), lone_row=max(0.0, lone), fold=max(0.0, fold),
            fold_rank=max(0.0, fold_rank), expand=max(0.0, expand), kept=max(0.0, kept),
            fill=self._fill(times), granule=16, lone_rows=few,
        )  # fmt: skip

    def torch_costs(self, times: Mapping[str, float]) -> Costs:
        n = self.count
        call = times["t call"]
        row = (times["t many"] - times["t tile"]) / 112 / n
        multiply = (times["t tile"] - call) / n - 16 * row
        fold_rank = (times["t fold high"] - times["t fold low"]) / (_HIGH_RANK - _LOW_RANK) / n
        segment = 2 * call  # two small operators more than the matmul
        fold = (times["t fold low"] - segment) / n - _LOW_RANK * fold_rank
        expand = ((times["t expand"] / _SEGMENTS - segment) / n - row) / _RANK
        kept = (times["t kept"] / _SEGMENTS - call) / n - max(0.0, multiply) - row
        return Costs(
            call_ns=max(0.0, call), segment_ns=max(0.0, segment),
            decode=max(0.0, times["t decode"] / n), multiply=max(0.0, multiply),
            row=max(0.0, row), lone_row=max(0.0, row), fold=max(0.0, fold),
            fold_rank=max(0.0, fold_rank), expand=max(0.0, expand), kept=max(0.0, kept),
            fill=self._fill(times),
        )  # fmt: skip

    def _fill(self, times: Mapping[str, float]) -> float:
        by_rank = (times["t fold high"] - times["t fold low"]) * _RANK / (_HIGH_RANK - _LOW_RANK)
        return max(0.0, (times["fill"] + times["t decode"] - max(0.0, by_rank)) / self.count)
