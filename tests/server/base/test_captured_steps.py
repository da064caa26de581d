"""Capturing steps where memory ends, or the device cannot: by a device that is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server.base.captured_steps import CannotCapture, CapturedSteps, GraphPool, StepKey
from server.base.failed_steps import MOST_FAILURES, FailedSteps

CUDA = torch.device("cuda")
NO_MEMORY = "CUDA out of memory. Tried to allocate 2 MiB"
MIB = 1 << 20


class MadeUpStream:
    def wait_stream(self, other: Any) -> None: ...


class MadeUpGraph:
    """A graph that only knows its pool, and how often it was replayed."""

    def __init__(self) -> None:
        self.replays = 0
        self.given: Any = None
        self.is_reset = False

    def pool(self) -> Any:
        return self.given

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.is_reset = True


@dataclass
class MadeUpDevice:
    """What torch.cuda is, as far as capturing uses it.

    Each graph takes a MiB. ``at_end`` is raised where the capture of a broken step ends: then
    nobody leaves the stream, as torch does not.
    """

    current: Any = field(default_factory=MadeUpStream)
    free: int = 100 * MIB
    graphs: list[MadeUpGraph] = field(default_factory=list)
    ran_on: list[Any] = field(default_factory=list)
    pools: list[Any] = field(default_factory=list)
    at_end: Exception | None = None
    lost: Exception | None = None

    def graph_of(self) -> MadeUpGraph:
        self.graphs.append(MadeUpGraph())
        return self.graphs[-1]

    def synchronize(self, _: Any) -> None:
        if self.lost is not None:
            raise self.lost

    @contextmanager
    def stream(self, wanted: Any) -> Iterator[None]:
        before, self.current = self.current, wanted
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capturing(self, graph: MadeUpGraph, pool: Any, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        self.pools.append(pool)
        graph.given = pool or f"pool {len(self.graphs)}"
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed and self.at_end is not None:
                raise self.at_end
            self.current = before
        self.free -= MIB

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    def run(self) -> None:
        """A step that notes where it ran."""
        self.ran_on.append(self.current)

    def failing(self, error: Exception, *, in_warm_up: bool = False) -> Callable[[], None]:
        """A step that raises when it is captured, or before."""
        runs = iter(range(9))

        def run() -> None:
            if next(runs) == (0 if in_warm_up else 2):
                raise error

        return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> MadeUpDevice:
    made = MadeUpDevice()
    for name, fake in {
        "Stream": lambda _: MadeUpStream(),
        "current_stream": lambda _: made.current,
        "set_stream": made.set_stream,
        "stream": made.stream,
        "CUDAGraph": made.graph_of,
        "graph": made.capturing,
        "empty_cache": lambda: None,
        "synchronize": made.synchronize,
        "mem_get_info": lambda _: (made.free, 100 * MIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def key(rows: int, rank: int = 32, *, lora: bool = False) -> StepKey:
    return StepKey(rows, rank, lora, True)


@pytest.mark.parametrize("in_warm_up", [True, False])
@pytest.mark.parametrize("end", [None, torch.AcceleratorError("capture was invalidated")])
def test_what_was_captured_stays_when_memory_ends(
    device: MadeUpDevice, in_warm_up: bool, end: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    steps, home = CapturedSteps(CUDA), device.current
    for rows in (8, 4):
        assert steps.capture(key(rows), device.run)
    device.at_end = end
    fails = device.failing(torch.OutOfMemoryError(NO_MEMORY), in_warm_up=in_warm_up)
    assert not steps.capture(key(2), fails)
    assert device.current is home
    assert list(steps) == [key(8), key(4)]
    assert steps.nbytes == 2 * MIB
    assert steps.replay(key(4))
    assert not steps.replay(key(2))
    assert [one.replays for one in device.graphs[:2]] == [0, 1]
    assert [one.is_reset for one in device.graphs] == [False, False, True][: 2 + (not in_warm_up)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "No memory to capture steps of 2 rows" in line
    assert NO_MEMORY in line
    assert "kv_bytes" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),  # where the driver makes the graph
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_ends_in_the_driver_or_a_library_is_known(
    device: MadeUpDevice, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    steps = CapturedSteps(CUDA)
    assert steps.capture(key(4), device.run)
    assert not steps.capture(key(2), device.failing(error))
    assert list(steps) == [key(4)]
    assert "No memory to capture steps of 2 rows" in caplog.text


@pytest.mark.parametrize("end", [None, torch.AcceleratorError("capture was invalidated")])
def test_another_error_is_not_taken_for_want_of_memory(
    device: MadeUpDevice, end: Exception | None
) -> None:
    steps, home = CapturedSteps(CUDA), device.current
    device.at_end = end
    # Of the kind that a lost device raises: this one answers, and so it is not.
    wrong = torch.AcceleratorError("operation not permitted\nwhen stream is capturing")
    with pytest.raises(CannotCapture, match="not permitted when stream is capturing") as raised:
        steps.capture(key(2), device.failing(wrong))
    assert raised.value.__cause__ is wrong
    assert device.current is home
    assert device.graphs[0].is_reset
    assert not list(steps)


def test_a_device_that_is_lost_is_not_taken_for_one_that_cannot(device: MadeUpDevice) -> None:
    steps = CapturedSteps(CUDA)
    lost = torch.AcceleratorError("an illegal memory access was encountered")

    def loses() -> None:
        device.lost = lost
        raise lost

    with pytest.raises(torch.AcceleratorError, match="illegal"):
        steps.capture(key(2), loses)


def test_memory_of_a_capture_that_failed_is_let_go_before_it_is_given_back(
    device: MadeUpDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []

    class Tensor:
        is_there = False

        def __init__(self) -> None:
            Tensor.is_there = True

        def __del__(self) -> None:
            Tensor.is_there = False

    def run() -> None:
        held = Tensor()
        raise torch.OutOfMemoryError(f"{NO_MEMORY} beside {type(held).__name__}")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(Tensor.is_there))
    assert not CapturedSteps(CUDA).capture(key(2), run)
    assert alive[-1] is False


def test_all_graphs_of_both_lanes_share_one_pool_and_one_stream(device: MadeUpDevice) -> None:
    pool = GraphPool(CUDA)
    lanes = [CapturedSteps(CUDA, pool), CapturedSteps(CUDA, pool)]
    # What the first one would have begun is gone: its name is not used again.
    assert not lanes[0].capture(key(16), device.failing(torch.OutOfMemoryError(NO_MEMORY)))
    for rows in (8, 4, 2):
        for lane in lanes:
            assert lane.capture(key(rows), device.run)
    assert device.pools[:2] == [None, None]
    assert set(device.pools[2:]) == {device.graphs[1].pool()}
    assert len({id(one) for one in device.ran_on}) == 1
    assert device.ran_on[0] is not device.current
    device.graphs.clear()
    del lanes[1]
    assert pool.handle is not None
    del lanes[0], lane
    assert pool.handle is None


def test_what_is_needed_later_is_left(
    device: MadeUpDevice, caplog: pytest.LogCaptureFixture
) -> None:
    steps = CapturedSteps(CUDA, None, spare_bytes=98 * MIB)
    done = list(steps.capture_all([key(rows) for rows in (1, 2, 4, 8)], lambda _: device.run()))
    assert done == [(1, 4), (2, 4)]
    assert list(steps) == [key(8), key(4)]
    assert "No memory to capture steps of 2 rows" in caplog.text
    assert "98 MiB are needed later" in caplog.text


def test_fewer_rows_are_captured_and_the_rest_is_served_by_no_step(device: MadeUpDevice) -> None:
    steps = CapturedSteps(CUDA)
    keys = [key(rows, rank, lora=rank == 128) for rows in (1, 2, 4) for rank in (0, 32, 128)]
    tried: list[StepKey] = []
    short: dict[StepKey, Callable[[], None]] = {}

    def run(one: StepKey) -> None:
        tried.append(one)
        if one.rows == 4:
            short.setdefault(one, device.failing(torch.OutOfMemoryError(NO_MEMORY)))()

    assert steps.serving(key(4)) == key(4)  # as long as nothing is decided
    list(steps.capture_all(keys, run))
    assert {one.rows for one in steps} == {1, 2}
    assert [one for one in dict.fromkeys(tried) if one.rows == 4] == [key(4, 128, lora=True)]
    assert steps.serving(key(2)) == key(2)
    assert steps.serving(key(1, 32, lora=True)) == key(1, 128, lora=True)
    assert steps.serving(key(4)) is None
    assert steps.serving(StepKey(1, 0, False, False)) is None


def test_the_heaviest_is_captured_first(device: MadeUpDevice) -> None:
    steps = CapturedSteps(CUDA)
    keys = [
        StepKey(rows, rank, False, plain)
        for rows in (1, 2)
        for rank in (0, 32)
        for plain in (True, False)
    ]
    list(steps.capture_all(keys, lambda _: device.run()))
    order = [(2, 32), (2, 0), (1, 32), (1, 0)]
    assert [key[:2] for key in steps] == [one for one in order for _ in range(2)]
    assert [key.plain for key in steps] == [False, True] * 4


def test_where_there_are_no_graphs_every_step_serves_itself() -> None:
    steps = CapturedSteps(torch.device("cpu"))
    assert not list(steps.capture_all([key(1)], lambda _: None))
    assert steps.serving(key(1)) == key(1)


def test_what_fails_again_and_again_is_told_twice_and_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = FailedSteps("A static step")
    for _ in range(MOST_FAILURES):
        assert not failed.is_given_up(key(4))
        failed.note(key(4), RuntimeError("no such\nlaunch"))
    assert failed.is_given_up(key(4))
    assert not failed.is_given_up(key(8))
    first, last = [record.getMessage() for record in caplog.records]
    assert first == "A static step failed and runs as without it: RuntimeError: no such launch"
    assert "of up to 4 rows failed 3 times in a row and is not tried again" in last
    assert not any(record.exc_info for record in caplog.records)


def test_failures_with_a_success_between_them_give_nothing_up() -> None:
    failed = FailedSteps("A static step")
    for _ in range(MOST_FAILURES + 1):
        failed.note(key(4), RuntimeError("memory"))
        failed.worked(key(4))
    assert not failed.is_given_up(key(4))


def test_what_a_request_does_wrong_gives_nothing_up() -> None:
    failed = FailedSteps("A static step")
    for _ in range(MOST_FAILURES):
        failed.hold(key(4), RuntimeError("shapes"))
    assert failed.is_given_up(key(4))  # until it is known
    failed.judge(by_request=True)
    assert not failed.is_given_up(key(4))
    for _ in range(MOST_FAILURES):
        failed.hold(key(4), RuntimeError("no such launch"))
        failed.worked(key(4))  # the half of it that ran as such a step says nothing of the whole
        failed.judge(by_request=False)
    assert failed.is_given_up(key(4))
