"""The worker's loop around the fake engine: whose requests run, and what ends when a part dies."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.edge.link.envelopes import Events, Requests
from server.edge.link.http_processes import HttpProcesses, RunningRequests
from server.edge.link.thread_deaths import watch_threads
from server.edge.link.worker_state import read_state
from server.edge.litserve import loop
from server.edge.litserve.loop import EngineLoop, LoopRun
from server.messages import Cancel, GenerateRequest, SamplingOptions, TokenEvent
from server.metrics import WorkerMetrics
from server.options import EngineOptions
from tests.stand.fake_engine import FakeEngine
from tests.stand.waits import until


class Broken(Exception):
    """Nobody foresaw it."""


class Queue:
    """LitServe's request queue; ends the thread that reads it when it is closed."""

    def __init__(self) -> None:
        self.items: queue.Queue[Any] = queue.Queue()
        self.error: Exception | None = None

    def get(self, timeout: float) -> Any:
        if self.error is not None:
            raise self.error
        return self.items.get(timeout=min(timeout, 0.02))

    def put(self, envelope: Requests) -> None:
        self.items.put((0, "requests", time.monotonic(), envelope))


class Transport:
    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.error: Exception | None = None

    def send(self, item: Any, consumer_id: int) -> None:
        if self.error is not None:
            raise self.error
        self.sent.put(item)


class Api:
    def __init__(self, run_dir: Path) -> None:
        options: Any = EngineOptions
        self.engine = FakeEngine(options)
        self.run_dir = run_dir


@pytest.fixture
def requests() -> Queue:
    return Queue()


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
def one_run(
    tmp_path: Path, requests: Queue, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> LoopRun:
    monkeypatch.setattr(loop, "WorkerMetrics", lambda: WorkerMetrics(CollectorRegistry()))
    monkeypatch.setattr(loop, "count_as", lambda _: None)
    api: Any = Api(tmp_path)
    return LoopRun(EngineLoop(1), api, 0, requests, transport)


@pytest.fixture
def died() -> Iterator[list[str]]:
    """Threads that died, in place of the end of this process."""
    names: list[str] = []
    before = threading.excepthook
    watch_threads(names.append)
    yield names
    threading.excepthook = before


@pytest.fixture
def caller() -> Iterator[subprocess.Popen[bytes]]:
    """An HTTP process."""
    sleep = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", sleep]) as child:
        yield child
        child.kill()


def generation(name: str) -> GenerateRequest:
    return GenerateRequest(name, None, None, (1, 2), SamplingOptions(max_new_tokens=10_000))


def test_requests_of_a_dead_http_process_are_cancelled(
    one_run: LoopRun, requests: Queue, caller: subprocess.Popen[bytes], died: list[str]
) -> None:
    reader = threading.Thread(target=one_run.read_requests, name="requests")
    reader.start()
    engine: Any = one_run.engine

    def running() -> set[str]:
        one_run.take_arrived()
        return set(engine.running)

    theirs = tuple(generation(f"0.{number}") for number in range(3))
    late = Requests(one_run.epoch, (generation("0.9"),), caller.pid)
    requests.put(Requests(one_run.epoch, theirs, caller.pid))
    requests.put(Requests(one_run.epoch, (generation("1.0"),), os.getpid()))
    until(lambda: running() == {"0.0", "0.1", "0.2", "1.0"})
    caller.kill()
    until(lambda: running() == {"1.0"})
    caller.wait()
    requests.put(late)  # what it had sent before, and was still in the queue
    requests.put(Requests(one_run.epoch, (generation("1.1"),), os.getpid()))
    until(lambda: "1.1" in running())
    assert running() == {"1.0", "1.1"}
    assert died == []
    requests.error = Broken()
    reader.join(10)


def test_books_of_requests_hold_those_that_are_under_way() -> None:
    books = RunningRequests()
    for name in ("0.1", "0.2", "0.3"):
        books.begin(7, generation(name))
    books.begin(8, generation("1.1"))
    books.begin(7, Cancel("0.1"))
    books.begin(7, Cancel("0.99"))
    failure = loop_failure("0.2")
    books.end([TokenEvent("0.3", 1, "a", None, special=False), failure, failure])
    assert books.abandoned(7) == ["0.3"]
    assert books.abandoned(7) == []
    assert books.abandoned(8) == ["1.1"]


def loop_failure(name: str) -> Any:
    from server.messages import Failure

    return Failure(name, "internal", "it broke")


def test_death_of_a_caller_is_noticed_once(caller: subprocess.Popen[bytes]) -> None:
    callers = HttpProcesses()
    assert callers.lives(caller.pid)
    assert callers.lives(os.getpid())
    assert callers.gone() == []
    caller.kill()
    until(lambda: callers.gone() == [caller.pid])
    assert callers.gone() == []
    caller.wait()
    assert not callers.lives(caller.pid)


@pytest.mark.parametrize("error", [OSError(5, "an error"), EOFError(), Broken()])
def test_death_of_the_reader_is_told(
    one_run: LoopRun, requests: Queue, died: list[str], error: Exception
) -> None:
    requests.error = error
    reader = threading.Thread(target=one_run.read_requests, name="requests")
    reader.start()
    reader.join(10)
    assert died == ["requests"]


@pytest.mark.parametrize("error", [OSError(5, "an error"), Broken()])
def test_death_of_the_writer_is_told(
    one_run: LoopRun, transport: Transport, died: list[str], error: Exception
) -> None:
    transport.error = error
    writer = threading.Thread(target=one_run.write_events, name="events")
    writer.start()
    one_run.outbox.put([loop_failure("0.1")])
    writer.join(10)
    assert died == ["events"]


def test_writer_sends_each_http_process_its_own(one_run: LoopRun, transport: Transport) -> None:
    one_run.outbox.put([loop_failure("0.1"), loop_failure("1.1"), loop_failure("0.2")])
    one_run.outbox.put(None)
    one_run.write_events()
    sent = [transport.sent.get(timeout=1)[1][0] for _ in range(2)]
    assert all(isinstance(one, Events) for one in sent)
    assert [[event.id for event in one.events] for one in sent] == [["0.1", "0.2"], ["1.1"]]


def test_queue_that_does_not_answer_is_told_of(one_run: LoopRun) -> None:
    one_run.tell_state()
    state = read_state(one_run.run_dir)
    assert state is not None
    assert state.queue_silent_s < 10
    one_run.queue_heard -= 100
    one_run.tell_state()
    state = read_state(one_run.run_dir)
    assert state is not None
    assert state.queue_silent_s > 90


def test_engine_that_breaks_ends_the_worker(
    one_run: LoopRun, monkeypatch: pytest.MonkeyPatch, requests: Queue, died: list[str]
) -> None:
    parts: list[str] = []

    class Ended(BaseException):
        pass

    def abandon(part: str) -> None:
        parts.append(part)
        raise Ended

    class Panic(BaseException):
        """As extensions in Rust raise."""

    def step() -> Any:
        raise Panic

    monkeypatch.setattr(loop, "abandon", abandon)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(one_run.engine, "step", step)
    requests.put(Requests(one_run.epoch, (generation("0.1"),), os.getpid()))
    with pytest.raises(Ended):
        one_run.run()
    assert parts == ["engine"]
    requests.error = Broken()  # and the threads that `run` began
    one_run.ending.set()
    one_run.outbox.put(None)
    until(lambda: died == ["requests"])
