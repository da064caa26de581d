"""Measures what each strategy takes for one shape class: the coefficients of ``adapters.costs``.

A few probes, a tenth of a second or so in all, on random weights no larger than half a million. On
a CPU they run in one thread and are measured in its own processor time, so what else runs on the
machine at the start counts little; what threads share is divided by their number afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import cycle

import torch

from adapters import native_path
from adapters.costs import UNMEASURED, Backend, Costs
from adapters.kernels import native_ops, torch_ops
from adapters.quant import QuantizedWeight, WeightKind
from adapters.segments import from_runs
from adapters.slot_factors import SlotFactors
from adapters.torch_path import Sources, Work, run_into
from adapters.workspace import Workspace

_ROUNDS = 5
_REPEATS = 8  # of a probe in its turn, at most
_TURN_NS = 1e6  # after which its turn ends
_ATTEMPTS = 4  # of so many rounds, while noise hides a coefficient
_PATIENCE_S = 0.5  # of this thread's time, after which no further round begins
_MOST_WEIGHTS = 1 << 19  # of a probe: costs are per weight, so larger ones tell nothing new
# Kept weights are read from memory: together they are larger than a cache of the processor.
_RING_WEIGHTS = 24 << 20
_RING_SEGMENTS = 64
_LOW_RANK, _RANK, _HIGH_RANK = 8, 32, 64
_SEGMENTS = 3

# What no probe is for: fixed, or nothing.
_GIVEN: Mapping[Backend, frozenset[str]] = {
    "native": frozenset({"segment_ns", "multiply", "granule", "lone_rows"}),
    "torch": frozenset({"granule", "lone_rows"}),
}

# What is left of a strategy beside its rows and ranks. Where those are slow it cannot be told from
# nothing, however often it is measured; and taken as nothing it makes no strategy free.
_SMALL = frozenset({"multiply", "fold", "fill"})

Probe = Callable[[], object]


def measure(
    shape: tuple[int, int], kind: WeightKind, dtype: torch.dtype, device: torch.device
) -> tuple[dict[Backend, Costs], set[str]]:
    """What each backend takes for layers like one.

    Args:
        shape: ``(out, in)`` of the layer.
        kind: How its weight is stored.
        dtype: The compute dtype.
        device: Where to measure.

    Returns:
        The costs by backend, and the names of coefficients that are built in, on a CPU whose noise
        hid them: measure again another time.
    """
    out_features = min(shape[0], max(64, _MOST_WEIGHTS // shape[1]))
    bench = _Bench((out_features, shape[1]), kind, dtype, device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    try:
        if threads > 1:
            torch.set_num_threads(1)
        found = bench.measured()
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
    share = bench.memory_share(threads)
    costs: dict[Backend, Costs] = {}
    hidden: set[str] = set()
    (built_in,) = UNMEASURED.table.values()
    for backend, one in found.items():
        costs[backend] = _shared(one, threads, share)
        doubtful = _doubtful(backend, one)
        stand_ins = dict.fromkeys(doubtful, 0.0)
        if device.type == "cpu":  # elsewhere it is less than a launch takes: nothing is right
            names = doubtful - _SMALL
            stand_ins |= {name: getattr(built_in[backend], name) for name in names}
            hidden |= names
        costs[backend] = replace(costs[backend], **stand_ins)  # type: ignore[arg-type]
    return costs, hidden


def _doubtful(backend: Backend, costs: Costs) -> set[str]:
    """Coefficients that cannot be true: a difference of two times that came out the wrong way.

    Taken as nothing, one of them would make its strategy the choice for every call.
    """
    names = {field.name for field in fields(Costs)} - _GIVEN[backend]
    return {name for name in names if getattr(costs, name) <= 0}


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
        self.best: dict[str, float] = {}  # of each probe, nanoseconds
        self.has_native = native_path.takes(self.x, self.weight, None) and all(
            own.native_record for own in self.factors.values()
        )

    def measured(self) -> dict[Backend, Costs]:
        """The costs of each backend in one thread; measured again, for a while, if in doubt."""
        probes = self._torch_probes()
        if self.has_native:
            probes |= self._native_probes()
        for probe in probes.values():
            probe()
        end = self._clock_s() + _PATIENCE_S
        for _ in range(_ATTEMPTS):
            self._run(probes, end)
            found: dict[Backend, Costs] = {"torch": self._torch_costs()}
            if self.has_native:
                found["native"] = self._native_costs()
            if not any(_doubtful(backend, one) for backend, one in found.items()):
                break
            if self._clock_s() > end:
                break
        return found

    def _run(self, probes: Mapping[str, Probe], end: float) -> None:
        """The least nanoseconds of each probe, in some rounds and those before."""
        best = self.best
        for _ in range(_ROUNDS):
            for name, probe in probes.items():
                best.setdefault(name, math.inf)
                # Alone in the caches, as in a forward of many such layers: the first call of a turn
                # pays for what the other probes left there.
                spent = 0.0
                for _ in range(_REPEATS):
                    took = self._time(probe)
                    best[name] = min(best[name], took)
                    spent += took
                    if spent > _TURN_NS:
                        break
            if self._clock_s() > end:
                break

    def _clock_s(self) -> float:
        return time.thread_time() if self.device.type == "cpu" else time.perf_counter()

    def memory_share(self, threads: int) -> float:
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
        return min(1.0, max(1 / threads, best / self.best["n kept"]))

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

    def _native_costs(self) -> Costs:
        times = self.best
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
            call_ns=call, segment_ns=0.0, decode=decode, multiply=0.0,
            row=row, lone_row=lone, fold=fold,
            fold_rank=fold_rank, expand=expand, kept=kept,
            fill=self._fill(times), granule=16, lone_rows=few,
        )  # fmt: skip

    def _torch_costs(self) -> Costs:
        times = self.best
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
            call_ns=call, segment_ns=segment,
            decode=times["t decode"] / n, multiply=multiply,
            row=row, lone_row=row, fold=fold,
            fold_rank=fold_rank, expand=expand, kept=kept,
            fill=self._fill(times),
        )  # fmt: skip

    def _fill(self, times: Mapping[str, float]) -> float:
        by_rank = (times["t fold high"] - times["t fold low"]) * _RANK / (_HIGH_RANK - _LOW_RANK)
        return (times["fill"] + times["t decode"] - max(0.0, by_rank)) / self.count
