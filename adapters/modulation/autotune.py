"""Times the strategies on the traffic itself and keeps the winners, as ``triton.autotune`` does.

The first times that a bucket of alike segments occurs, every candidate runs on it, in turn, and is
timed; later ever more rarely, for as long as the traffic lasts. What counts is the least of a
candidate's latest times, so one disturbed time decides nothing, and what lost within the noise, or
on a machine that has changed, may win later. Times are kept in a file for the next start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat

from adapters.kernels import native_ops
from adapters.modulation.gpu_kernels import kernels_digest
from adapters.modulation.strategy import Backend, Bucket, Candidate, Computation

logger = logging.getLogger(__name__)

_FIRST_ROUNDS = 3  # at the first occurrences; from then on at 8, 16, 32, ... occurrences
_LATEST = 5  # times of a candidate that count
_ROUNDS_A_FORWARD = 2  # so that no single request waits for all buckets of its batch
_SAVED_EVERY = 16  # rounds


class _File(BaseModel):
    """Nanoseconds by bucket and candidate, and what they hold for."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    machine: dict[str, str | int]
    ns: dict[str, dict[str, PositiveFloat]]


class _Times:
    """Of one bucket: how often it occurred and was timed, and the latest times."""

    __slots__ = ("latest", "occurrences", "rounds")

    def __init__(self, rounds: int = 0) -> None:
        self.occurrences = 0
        self.rounds = rounds
        self.latest: dict[Candidate, deque[float]] = {}

    def add(self, candidate: Candidate, ns: float) -> None:
        self.latest.setdefault(candidate, deque(maxlen=_LATEST)).append(ns)


class Autotuner:
    """The times of every bucket that occurred. One thread uses it.

    Args:
        folder: Where the times are kept between starts; None keeps nothing.
        device: What is timed.
        clock: Nanoseconds. None: of this thread's processor time, which does its own share of what
            threads do together and counts nothing else that runs on the machine; on a GPU, of the
            wall clock around a synchronization.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._clock = clock or (time.perf_counter_ns if self._gpu else time.thread_time_ns)
        self._machine = _machine(self._gpu)
        self._path: Path | None = None
        self._times: dict[Bucket, _Times] = {}
        self._left = _ROUNDS_A_FORWARD  # of this forward
        self._unsaved = 0  # rounds
        if folder is not None:
            digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()
            self._path = folder / f"strategies-{digest[:16]}.json"
            self._load(self._path)

    def __len__(self) -> int:
        return len(self._times)

    def begin_forward(self) -> None:
        """A forward begins, which may be delayed by a few rounds; writes the file now and then."""
        self._left = _ROUNDS_A_FORWARD
        if self._unsaved and (
            self._unsaved >= _SAVED_EVERY or all(map(self.is_settled, self._times))
        ):
            self._save()

    def is_settled(self, bucket: Bucket) -> bool:
        """Whether a bucket has been timed as often as it is at first."""
        times = self._times.get(bucket)
        return times is not None and times.rounds >= _FIRST_ROUNDS

    def is_due(self, bucket: Bucket, candidates: Iterable[Candidate]) -> bool:
        """Count an occurrence; whether ``run`` should time the candidates now."""
        times = self._times.setdefault(bucket, _Times())
        times.occurrences += 1
        if not self._left:
            return False
        if times.rounds < _FIRST_ROUNDS or times.occurrences >= 2**times.rounds:
            return True
        return not times.latest.keys() >= set(candidates)

    def run(self, bucket: Bucket, candidates: Mapping[Candidate, Callable[[], object]]) -> None:
        """Time each candidate once; which one begins changes from round to round.

        One that fails, for want of memory say, counts as never ending.
        """
        times = self._times.setdefault(bucket, _Times())
        turn = times.rounds % len(candidates)
        order = list(candidates)
        for candidate in order[turn:] + order[:turn]:
            try:
                times.add(candidate, self._ns(candidates[candidate]))
            except Exception as error:  # noqa: BLE001  # of a compiler, too: another one serves
                logger.warning("%s could not be timed: %s", " ".join(candidate), error)
                times.add(candidate, math.inf)
        times.rounds += 1
        self._left -= 1
        self._unsaved += 1

    def ns(self, bucket: Bucket, candidate: Candidate) -> float | None:
        """The least of a candidate's latest times; None before the first."""
        times = self._times.get(bucket)
        latest = None if times is None else times.latest.get(candidate)
        return min(latest) if latest else None

    def _ns(self, run: Callable[[], object]) -> float:
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        began = self._clock()
        run()
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        return float(max(1, self._clock() - began))

    def _load(self, path: Path) -> None:
        try:
            held = _File.model_validate_json(path.read_bytes())
            if held.machine != self._machine:
                raise ValueError("it is of another machine or version")
            for text, ns in held.ns.items():
                times = self._times[_bucket(text)] = _Times(_FIRST_ROUNDS)
                for name, one in ns.items():
                    times.add(_candidate(name), one)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be used (%s): the strategies are timed anew.", path, error)
            self._times.clear()

    def _save(self) -> None:
        self._unsaved = 0
        if self._path is None:
            return
        ns: dict[str, dict[str, float]] = {}
        for bucket, times in self._times.items():
            if times.rounds >= _FIRST_ROUNDS:
                least = {" ".join(one): min(latest) for one, latest in times.latest.items()}
                text = ",".join(map(str, bucket))
                ns[text] = {name: one for name, one in least.items() if one < math.inf}
        text = _File(machine=self._machine, ns=ns).model_dump_json(indent=1)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the next start times anew.", self._path, error
            )
            self._path = None
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(gpu: torch.device | None) -> dict[str, str | int]:
    """All that the times depend on, beside what a bucket says."""
    return {
        "device": torch.cuda.get_device_name(gpu) if gpu else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernel": kernels_digest() if gpu else native_ops.digest() or "none",
    }


def _bucket(text: str) -> Bucket:
    """Raises ValueError unless it is one."""
    weights, inputs, storage, rows, adapters, rank = text.split(",")
    return Bucket(int(weights), int(inputs), storage, int(rows), int(adapters), int(rank))


def _candidate(text: str) -> Candidate:
    """Raises ValueError unless it is one."""
    backends: dict[str, Backend] = {one: one for one in get_args(Backend)}
    ways: dict[str, Computation] = {one: one for one in get_args(Computation)}
    backend, _, way = text.partition(" ")
    if backend not in backends or way not in ways:
        raise ValueError(f"{text!r} is no strategy")
    return backends[backend], ways[way]
