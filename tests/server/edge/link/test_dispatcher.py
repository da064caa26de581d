"""The dispatcher: every admitted request ends, whatever happens to worker, client and clock."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.dispatcher import LOOK_TICKS, TICK_S, Dispatcher
from server.edge.link.envelopes import Events, Requests, WorkerReady, http_process_of, request_id
from server.edge.link.link import STALE_S
from server.edge.link.thread_deaths import watch_threads
from server.edge.link.worker_state import WorkerState, read_state, state_path, write_state
from server.errors import Refusal
from server.messages import (
    Cancel,
    EncodeRequest,
    EncodeResult,
    Failure,
    GenerateRequest,
    Preload,
    TokenEvent,
    TokenizedInput,
)

WIDE = Bounds(requests=1000, tokens=1_000_000, adapter_requests=1000)


class Wire:
    """A request queue that remembers what was put."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def put(self, item: Any) -> None:
        if self.error is not None:
            raise self.error
        self.items.put(item)
        assert self.open.wait(10)

    async def messages(self) -> tuple[Any, ...]:
        item = await asyncio.to_thread(self.items.get, True, 5.0)
        assert isinstance(item[3], Requests)
        return item[3].messages


@dataclass
class Scene:
    dispatcher: Dispatcher
    wire: Wire
    worker: subprocess.Popen[bytes]
    epoch: str = "first"
    load: SharedLoad = field(default_factory=lambda: SharedLoad(1))

    def say(self, *events: Any) -> None:
        self.dispatcher.append([Events(self.epoch, events), "OK"])


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process to watch."""
    sleep = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", sleep]) as child:
        yield child
        child.kill()


def play(
    tmp_path: Path,
    worker: subprocess.Popen[bytes],
    scenario: Callable[[Scene], Awaitable[None]],
    bounds: Bounds = WIDE,
) -> None:
    async def run() -> None:
        load = SharedLoad(1)
        dispatcher = Dispatcher(load, bounds, 1, tmp_path)
        wire = Wire()
        await dispatcher.start(0, wire)
        scene = Scene(dispatcher, wire, worker, load=load)
        later = time.monotonic() + 60  # or it would be silent where the test is slow
        write_state(tmp_path, WorkerState(0, scene.epoch, worker.pid, later, 0.0))
        dispatcher.append([WorkerReady(scene.epoch, worker.pid), "OK"])
        try:
            await asyncio.wait_for(scenario(scene), 20)
        finally:
            await dispatcher.stop()

    asyncio.run(run())


def encode_request(
    tokens: int = 3, adapter: str | None = None, timeout_s: float | None = None
) -> EncodeRequest:
    return EncodeRequest(
        id="",
        task="text-classification",
        adapter=adapter,
        version=adapter,
        inputs=(TokenizedInput(tuple(range(tokens))),),
        submitted=time.monotonic(),
        deadline=None if timeout_s is None else time.monotonic() + timeout_s,
    )


def result(request: str, output: object = "yes") -> EncodeResult:
    return EncodeResult(request, (output,), None, 3, 1.0, 2.0)


def test_ids_name_the_process_that_waits() -> None:
    assert http_process_of(request_id(7, 123)) == 7


def test_answer_reaches_the_request_that_it_belongs_to(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with (
            scene.dispatcher.admit(encode_request()) as one,
            scene.dispatcher.admit(encode_request()) as two,
        ):
            scene.say(result(two.request.id, "two"), result(one.request.id, "one"))
            assert await one.next() == result(one.request.id, "one")
            assert await two.next() == result(two.request.id, "two")
        assert scene.load.requests() == scene.load.tokens() == 0

    play(tmp_path, worker, scenario)


def test_requests_travel_with_the_epoch_of_the_worker(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request()) as ticket:
            number, _, _, envelope = await asyncio.to_thread(scene.wire.items.get, True, 5.0)
            assert (number, envelope.epoch) == (0, "first")
            assert envelope.messages == (ticket.request,)
            scene.say(result(ticket.request.id))

    play(tmp_path, worker, scenario)


def test_dead_worker_fails_all_requests_at_once_and_new_ones_are_refused(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with ExitStack() as stack:
            tickets = [
                stack.enter_context(scene.dispatcher.admit(encode_request())) for _ in range(5)
            ]
            scene.worker.kill()
            events = [await ticket.next() for ticket in tickets]
            codes = {event.code for event in events if isinstance(event, Failure)}
            assert codes == {"worker_lost"}
            assert len(events) == 5
        with pytest.raises(Refusal, match="worker_lost"):
            scene.dispatcher.admit(encode_request()).__enter__()

    play(tmp_path, worker, scenario)


def test_next_worker_is_taken_up_and_gets_nothing_of_the_last(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request()) as old:
            await scene.wire.messages()
            scene.worker.kill()
            assert isinstance(await old.next(), Failure)
        sleep = "import time; time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", sleep]) as second:
            scene.dispatcher.append([WorkerReady("second", second.pid), "OK"])
            assert scene.dispatcher.status == "ready"
            with scene.dispatcher.admit(encode_request()) as ticket:
                messages = await scene.wire.messages()
                assert messages == (ticket.request,)
                scene.dispatcher.append([Events("first", (result(old.request.id),)), "OK"])
                scene.say(result(ticket.request.id, "fresh"))
                assert await ticket.next() == result(ticket.request.id, "fresh")
            second.kill()

    play(tmp_path, worker, scenario)


def test_what_was_not_sent_before_a_death_is_never_sent(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.wire.open.clear()  # the queue is slow: what follows waits in the dispatcher
        with ExitStack() as stack:
            first = stack.enter_context(scene.dispatcher.admit(encode_request()))
            assert await scene.wire.messages() == (first.request,)
            waiting = stack.enter_context(scene.dispatcher.admit(encode_request()))
            scene.worker.kill()
            assert isinstance(await waiting.next(), Failure)
        sleep = "import time; time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", sleep]) as second:
            scene.dispatcher.append([WorkerReady("second", second.pid), "OK"])
            with scene.dispatcher.admit(encode_request()) as fresh:
                scene.wire.open.set()
                assert await scene.wire.messages() == (fresh.request,)
            second.kill()

    play(tmp_path, worker, scenario)


def test_worker_that_is_known_from_its_file_is_taken_up_at_start(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    now = time.monotonic()
    write_state(tmp_path, WorkerState(0, "first", worker.pid, now, 0.0, {"a": 1}))
    assert read_state(tmp_path) == WorkerState(0, "first", worker.pid, now, 0.0, {"a": 1})
    state_path(tmp_path, 1).write_text('{"half":')
    assert read_state(tmp_path, 1) is None

    async def run() -> None:
        dispatcher = Dispatcher(SharedLoad(1), WIDE, 1, tmp_path)
        assert dispatcher.status == "starting"
        await dispatcher.start(0, Wire())
        assert dispatcher.status == "ready"
        assert dispatcher.silent_s() < 5
        await dispatcher.stop()

    asyncio.run(run())


def test_deadline_ends_the_request_and_cancels_its_work(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request(timeout_s=0.2)) as ticket:
            assert await scene.wire.messages() == (ticket.request,)
            event = await ticket.next()
            assert isinstance(event, Failure)
            assert event.code == "deadline_exceeded"
            assert await scene.wire.messages() == (Cancel(ticket.request.id),)
        with pytest.raises(Refusal, match="deadline_exceeded"):
            scene.dispatcher.admit(encode_request(timeout_s=-1)).__enter__()

    play(tmp_path, worker, scenario)


def test_leaving_before_the_end_cancels_the_work(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        request = GenerateRequest("", None, None, (1, 2), stream=True, submitted=time.monotonic())
        with scene.dispatcher.admit(request) as ticket:
            await scene.wire.messages()
            scene.say(TokenEvent(ticket.request.id, 5, "a", None, special=False))
            assert isinstance(await ticket.next(), TokenEvent)
        assert await scene.wire.messages() == (Cancel(ticket.request.id),)
        assert scene.dispatcher.running == 0

    play(tmp_path, worker, scenario)


def test_finished_request_is_not_cancelled(tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request()) as ticket:
            await scene.wire.messages()
            scene.say(result(ticket.request.id))
        scene.dispatcher.tell(Preload("v"))
        assert await scene.wire.messages() == (Preload("v"),)

    play(tmp_path, worker, scenario)


def test_full_queue_refuses_with_a_time_to_come_back(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(scene.dispatcher.admit(encode_request()))
            with pytest.raises(Refusal) as caught:
                stack.enter_context(scene.dispatcher.admit(encode_request()))
            assert caught.value.status == 429
            assert int(caught.value.headers["Retry-After"]) >= 1
        with scene.dispatcher.admit(encode_request()):
            assert scene.load.requests() == 1

    play(tmp_path, worker, scenario, Bounds(3, 1_000_000, 1000))


def test_one_adapter_cannot_take_all_places(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(scene.dispatcher.admit(encode_request(adapter="hot")))
            with pytest.raises(Refusal, match="overloaded"):
                stack.enter_context(scene.dispatcher.admit(encode_request(adapter="hot")))
            stack.enter_context(scene.dispatcher.admit(encode_request(adapter="cold")))

    play(tmp_path, worker, scenario, Bounds(100, 1_000_000, 2))


def test_silent_worker_is_not_given_new_requests(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    def beat(at: float) -> None:
        write_state(tmp_path, WorkerState(0, "first", worker.pid, at, 0.0, {}))

    async def scenario(scene: Scene) -> None:
        beat(time.monotonic() - STALE_S - 1)
        await asyncio.sleep((LOOK_TICKS + 2) * TICK_S)
        with pytest.raises(Refusal, match="worker_silent") as caught:
            scene.dispatcher.check_early(None)
        assert caught.value.status == 503
        beat(time.monotonic())
        await asyncio.sleep((LOOK_TICKS + 2) * TICK_S)
        scene.dispatcher.check_early(None)

    play(tmp_path, worker, scenario)


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("error", [OSError(5, "an error of the disk"), ValueError("unforeseen")])
@pytest.mark.parametrize("part", ["sender", "ticker"])
def test_death_of_a_part_ends_the_process_and_answers_all(
    tmp_path: Path,
    worker: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    error: Exception,
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to be as before
    ended: list[str] = []

    async def scenario(scene: Scene) -> None:
        dispatcher, loop = scene.dispatcher, asyncio.get_running_loop()
        dispatcher.end = lambda: ended.append("in order")

        def died(name: str) -> None:
            loop.call_soon_threadsafe(dispatcher.give_up, name)

        watch_threads(died)
        with ExitStack() as stack:
            if part == "sender":
                scene.wire.error = error
            else:
                monkeypatch.setattr(scene.load, "beat", lambda _: raise_(error))
            ticket = stack.enter_context(dispatcher.admit(encode_request()))
            event = await ticket.next()
            assert isinstance(event, Failure)
            assert event.code == "restarting"
            with pytest.raises(Refusal, match="restarting") as caught:
                dispatcher.check_early(None)
            assert caught.value.status == 503
        assert dispatcher.status == "restarting", "and so it is not ready"
        dispatcher.give_up("another")
        assert ended == ["in order"]

    play(tmp_path, worker, scenario)


def raise_(error: Exception) -> None:
    raise error


def test_greeting_that_was_lost_is_made_up_for(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.worker.kill()
        await until(lambda: scene.dispatcher.status == "worker_lost")
        now = time.monotonic()
        sleep = "import time; time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", sleep]) as second:
            write_state(tmp_path, WorkerState(0, "second", second.pid, now, 0.0))
            await until(lambda: scene.dispatcher.status == "ready")
            with scene.dispatcher.admit(encode_request()):
                item = await asyncio.to_thread(scene.wire.items.get, True, 5.0)
                assert item[3].epoch == "second"
                assert item[3].pid == os.getpid()
            second.kill()

    play(tmp_path, worker, scenario)


def test_state_that_a_dead_worker_left_does_not_bring_it_back(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        now = time.monotonic()
        state = WorkerState(0, scene.epoch, worker.pid, now, 0.0)
        scene.worker.kill()  # and not waited for: its pid is still taken
        await until(lambda: scene.dispatcher.status == "worker_lost")
        scene.dispatcher._look(state)
        assert scene.dispatcher.status == "worker_lost"

    play(tmp_path, worker, scenario)


def test_worker_that_cannot_be_watched_yet_is_taken_up_later(
    tmp_path: Path, worker: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        dispatcher = Dispatcher(SharedLoad(1), WIDE, 1, tmp_path)
        await dispatcher.start(0, Wire())
        with monkeypatch.context() as broken:
            broken.setattr(os, "pidfd_open", lambda _: raise_(OSError(24, "no descriptor left")))
            dispatcher.append([WorkerReady("first", worker.pid), "OK"])
        assert dispatcher.status == "starting"
        now = time.monotonic()
        dispatcher._look(WorkerState(0, "first", worker.pid, now, 0.0))
        assert dispatcher.status == "ready"
        await dispatcher.stop()

    asyncio.run(run())


def test_state_that_cannot_be_read_is_silence(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        state_path(tmp_path, 0).unlink()
        state_path(tmp_path, 0).mkdir()  # EISDIR
        await until(lambda: scene.dispatcher.status == "worker_silent")
        state_path(tmp_path, 0).rmdir()
        now = time.monotonic()
        write_state(tmp_path, WorkerState(0, scene.epoch, worker.pid, now, 0.0))
        await until(lambda: scene.dispatcher.status == "ready")

    play(tmp_path, worker, scenario)


def test_event_that_cannot_be_counted_is_an_answer_all_the_same(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.dispatcher.on_event = lambda *_: raise_(OSError(28, "no room for counters"))
        with (
            scene.dispatcher.admit(encode_request()) as one,
            scene.dispatcher.admit(encode_request()) as two,
        ):
            scene.say(result(one.request.id, "one"), result(two.request.id, "two"))
            assert await one.next() == result(one.request.id, "one")
            assert await two.next() == result(two.request.id, "two")

    play(tmp_path, worker, scenario)


def test_draining_refuses_new_requests_and_stopping_ends_the_rest(
    tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request()) as ticket:
            scene.load.phase = Phase.DRAINING
            with pytest.raises(Refusal, match="draining"):
                scene.dispatcher.admit(encode_request()).__enter__()
            scene.load.phase = Phase.STOPPING
            event = await ticket.next()
            assert isinstance(event, Failure)
            assert event.code == "draining"
            sent = (*await scene.wire.messages(), *await scene.wire.messages())
            assert sent == (ticket.request, Cancel(ticket.request.id))

    play(tmp_path, worker, scenario)


def test_what_runs_at_the_end_is_cancelled(tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    async def scenario(scene: Scene) -> None:
        with scene.dispatcher.admit(encode_request()) as ticket:
            assert await scene.wire.messages() == (ticket.request,)
            await scene.dispatcher.stop()
            assert await scene.wire.messages() == (Cancel(ticket.request.id),)

    play(tmp_path, worker, scenario)


@pytest.mark.parametrize(
    ("bounds", "fits"),
    [
        (Bounds(3, 1000, 1000), True),
        (Bounds(2, 1000, 1000), False),
        (Bounds(1000, 1000, 2), False),
        (Bounds(1000, 8, 1000), False),
        (Bounds(1000, 9, 1000), True),
        (Bounds(1000, 1000, 1000, 8), False),
        (Bounds(1000, 1000, 1000, 9), True),
    ],
)
def test_what_can_never_run_together_is_told_so(bounds: Bounds, fits: bool, tmp_path: Path) -> None:
    dispatcher = Dispatcher(SharedLoad(1), bounds, 1, tmp_path)
    one = encode_request(3)
    dispatcher.check_fits([one], "prompt")
    if fits:
        dispatcher.check_fits([one] * 3, "prompt")
        return
    with pytest.raises(Refusal, match="request_too_large") as caught:
        dispatcher.check_fits([one] * 3, "prompt")
    assert (caught.value.status, caught.value.faults[0].field) == (413, "prompt")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    bound=st.integers(1, 8),
    token_bound=st.integers(1, 80),
)
def test_admitted_never_exceeds_the_bounds(sizes: list[int], bound: int, token_bound: int) -> None:
    async def run() -> None:
        load = SharedLoad(2)
        dispatcher = Dispatcher(load, Bounds(bound, token_bound, 1000), 2, Path("/nonexistent"))
        dispatcher._epoch = "here"
        with ExitStack() as stack:
            for size in sizes:
                with suppress(Refusal):
                    stack.enter_context(dispatcher.admit(encode_request(size)))
                assert load.requests() <= bound
                # A single request larger than the bound may run, but only alone.
                assert load.tokens() <= token_bound or load.requests() == 1
        assert load.requests() == load.tokens() == 0

    asyncio.run(run())
