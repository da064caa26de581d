"""Capturing a graph where that fails, at any point: by streams and graphs that are made up."""

from __future__ import annotations

import logging
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

import pytest
import torch

from adapters.modulation import step_forms
from adapters.modulation.graph_capture import capture_graph, ends_memory

CUDA = torch.device("cuda", 5)
HOME, ASIDE = "home", "aside"
Point = Literal["begin", "launches", "end"]


def invalidated() -> Exception:
    return torch.AcceleratorError("capture was invalidated")


class Device:
    """What torch.cuda is, as far as capturing uses it; it fails at one point of one capture.

    As PyTorch's, a capture changes the stream before it begins and returns only after its end.
    """

    def __init__(self, fails_at: Point | None = None, capture: int = 1) -> None:
        self.fails_at = fails_at
        self.capture = capture
        self.current = HOME
        self.graphs: list[Graph] = []

    def graph_of(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    def set_stream(self, stream: str) -> None:
        self.current = stream

    def breaks(self, *points: Point) -> bool:
        return self.fails_at in points and len(self.graphs) == self.capture


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.is_reset = False
        self.replays_on: list[str] = []

    def replay(self) -> None:
        self.replays_on.append(self.device.current)

    def reset(self) -> None:
        self.is_reset = True
        raise invalidated()  # and yet what failed first is what is told


class Capture:
    def __init__(self, graph: Graph, pool: Any, stream: Any) -> None:
        assert pool is None
        self.device, self.stream = graph.device, stream or ASIDE
        self.before = self.device.current

    def __enter__(self) -> None:
        self.device.current = self.stream
        if self.device.breaks("begin"):
            raise invalidated()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None or self.device.breaks("end"):
            raise invalidated()
        self.device.current = self.before


def on(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    for name, fake in {
        "CUDAGraph": device.graph_of,
        "graph": Capture,
        "current_stream": lambda _: device.current,
        "set_stream": device.set_stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


@pytest.mark.parametrize("stream", [None, "of the caller"])
def test_a_capture_runs_aside_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, stream: str | None
) -> None:
    device = on(Device(), monkeypatch)
    ran_on: list[str] = []
    graph = capture_graph(lambda: ran_on.append(device.current), CUDA, stream=stream)
    assert ran_on == [stream or ASIDE]
    assert device.current == HOME
    assert device.graphs == [graph]
    assert not graph.is_reset


@pytest.mark.parametrize("point", ["begin", "launches", "end"])
def test_a_capture_that_fails_leaves_the_thread_where_it_was(
    monkeypatch: pytest.MonkeyPatch, point: Point
) -> None:
    device = on(Device(point), monkeypatch)
    wrong = RuntimeError("not permitted when stream is capturing")

    def launches() -> None:
        if device.breaks("launches"):
            raise wrong

    with pytest.raises(RuntimeError) as caught:
        capture_graph(launches, CUDA)
    assert str(caught.value) == str(wrong if point == "launches" else invalidated())
    assert device.current == HOME
    assert device.graphs[0].is_reset


@pytest.mark.parametrize("point", ["begin", "launches", "end"])
def test_a_form_that_cannot_be_captured_leaves_the_others_on_the_stream_of_the_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: Point
) -> None:
    device = on(Device(point, capture=2), monkeypatch)
    answer = torch.ones(2, 2)
    warm_on: list[str] = []
    monkeypatch.setattr(step_forms, "_replay_ms", lambda graph: 9.0 - device.graphs.index(graph))

    def run() -> torch.Tensor:
        if device.current == HOME:
            warm_on.append(HOME)
        elif device.breaks("launches"):
            raise RuntimeError("not permitted when stream is capturing")
        return answer

    runs: dict[step_forms.StepForm, Any] = dict.fromkeys(("tiles", "product", "expanded"), run)
    with caplog.at_level(logging.WARNING):
        assert step_forms.fastest(runs, CUDA) == "expanded"
    assert device.current == HOME
    assert len(warm_on) == 6  # each to be compared, and again before it was captured
    assert [one.is_reset for one in device.graphs] == [False, True, False]
    assert [one.replays_on for one in device.graphs] == [[HOME], [], [HOME]]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.startswith("product was not timed for steps: ")


def test_what_a_failed_capture_held_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    on(Device(), monkeypatch)
    made: list[int] = []
    held: set[int] = set()

    class Buffer:
        def __init__(self) -> None:
            made.append(1)
            held.add(id(self))

        def __del__(self) -> None:
            held.remove(id(self))

    def launches() -> None:
        buffer = Buffer()
        raise torch.OutOfMemoryError(f"CUDA out of memory beside {type(buffer).__name__}")

    with suppress(torch.OutOfMemoryError):  # pytest.raises would keep the frames
        capture_graph(launches, CUDA)
    assert made == [1]
    assert not held


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of resource"), False),
    ],
)
def test_want_of_memory_is_known_by_class_or_words(error: Exception, wanted: bool) -> None:
    assert ends_memory(error) is wanted
