"""The LitLoop: reads LitServe's request queue, steps the engine, sends its events back.

Three threads: one blocks on the request queue, one on sending, and the main one does nothing but
step the engine, so the device never waits for a queue. Requests of another epoch, left in the queue
when an earlier worker died, are dropped: their clients have their answer already. So are those of
an HTTP process that died, and what it had under way is cancelled: it has no clients any more.
When any of the threads dies, the worker does.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from server.edge.link.engine_like import EngineLike
from server.edge.link.engine_steps import EngineSteps
from server.edge.link.envelopes import EVENTS_UID, Events, Requests, WorkerReady, http_process_of
from server.edge.link.http_processes import HttpProcesses, RunningRequests
from server.edge.link.worker_state import WorkerState, stopping_path, write_state
from server.edge.litserve.api import HiraAPI, abandon
from server.messages import Cancel, Event
from server.metrics import WorkerMetrics, count_as

logger = logging.getLogger(__name__)

# A worker killed while it waits in the queue leaves a wait behind in the queue's process, which
# swallows the next request. No worker is back within this time, and none is sent before that.
READ_S: Final = 0.2
BEAT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Gone:
    """An HTTP process died."""

    pid: int


class EngineLoop(LitLoop):
    """See the module.

    Args:
        http_processes: How many there are; all hear that the worker is ready.
    """

    def __init__(self, http_processes: int) -> None:
        super().__init__()
        self.http_processes = http_processes

    def pre_setup(self, lit_api: HiraAPI, spec: object = None) -> None:
        """Nothing to check: the LitAPI's hooks are not used."""

    def __call__(  # noqa: PLR0917  # LitServe calls it so
        self,
        lit_api: HiraAPI,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        assert lit_api.engine is not None
        LoopRun(self, lit_api, worker_id, request_queue, transport).run()


class LoopRun:
    """One run of the loop: what one worker reads, steps and sends, until it ends.

    `run` blocks until the worker is told to end; each of the other methods is what one thread does.

    Args:
        loop: Puts responses as LitServe wants them, and knows how many HTTP processes there are.
        lit_api: With its engine made.
        worker: Its number.
        requests: LitServe's request queue.
        transport: LitServe's way back to the HTTP processes.
    """

    def __init__(
        self, loop: EngineLoop, lit_api: HiraAPI, worker: int, requests: Any, transport: Any
    ) -> None:
        assert lit_api.engine is not None
        self.loop = loop
        self.engine: EngineLike = lit_api.engine
        self.run_dir = lit_api.run_dir
        self.worker = worker
        self.requests = requests
        self.transport = transport
        self.epoch = f"{os.getpid()}-{time.time_ns()}"
        count_as(f"worker-{worker}")
        self.steps = EngineSteps(self.engine, WorkerMetrics(), BEAT_S)
        self.inbox: queue.SimpleQueue[Requests | _Gone] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
        self.http_processes = HttpProcesses()
        self.under_way = RunningRequests()
        self.queue_heard = time.monotonic()  # when the queues' process last answered
        self.ending = threading.Event()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._on_term)
        self.steps.look()
        self.tell_state()
        threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (
                ("requests", self.read_requests),
                ("events", self.write_events),
                ("beat", self._keep_beating),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            for http_process in range(self.loop.http_processes):
                self._put(http_process, WorkerReady(self.epoch, os.getpid()))
            self.steps.run(self.take_arrived, self._deliver, self._has_ended)
        except BaseException:
            # The engine fails single requests itself; after this its state is not known.
            logger.exception("The engine failed")
            abandon("engine")
        self.outbox.put(self.engine.close())
        self.outbox.put(None)
        threads[1].join(timeout=2.0)

    def _on_term(self, number: int, frame: object) -> None:
        self.ending.set()
        self.engine.wake()

    def _has_ended(self) -> bool:
        return self.ending.is_set() and (self._is_over() or self._is_idle())

    def _deliver(self, events: list[Event]) -> None:
        self.under_way.end(events)
        self.outbox.put(events)

    def _is_over(self) -> bool:
        """Whether the bound of the drain has passed: what still runs has been answered already."""
        return stopping_path(self.run_dir).exists()

    def _is_idle(self) -> bool:
        self.steps.look()
        return self.inbox.empty() and not any(self.steps.snapshot.get("queue_depth", {}).values())

    def take_arrived(self) -> None:
        """Hand over what has arrived."""
        while not self.inbox.empty():
            arrived = self.inbox.get()
            if isinstance(arrived, _Gone):
                abandoned = self.under_way.abandoned(arrived.pid)
                logger.warning(
                    "HTTP process %d is gone: %d requests are cancelled",
                    arrived.pid,
                    len(abandoned),
                )
                for one in abandoned:
                    self.engine.submit(Cancel(one))
                continue
            for message in arrived.messages:
                self.under_way.begin(arrived.pid, message)
                self.engine.submit(message)

    def read_requests(self) -> None:
        while True:
            try:
                _, _, _, envelope = self.requests.get(timeout=READ_S)
            except queue.Empty:
                envelope = None
            self.queue_heard = time.monotonic()
            # Before what has just come, which may be of the same process.
            gone = self.http_processes.gone()
            for pid in gone:
                self.inbox.put(_Gone(pid))
            if isinstance(envelope, Requests) and envelope.epoch == self.epoch:
                if self.http_processes.lives(envelope.pid):
                    self.inbox.put(envelope)
            elif not gone:
                continue
            self.engine.wake()

    def write_events(self) -> None:
        while (events := self.outbox.get()) is not None:
            batches: defaultdict[int, list[Event]] = defaultdict(list)
            for event in events:
                batches[http_process_of(event.id)].append(event)
            for http_process, batch in batches.items():
                self._put(http_process, Events(self.epoch, tuple(batch)))

    def _put(self, http_process: int, envelope: Events | WorkerReady) -> None:
        self.loop.put_response(
            self.transport,
            http_process,
            EVENTS_UID,
            envelope,
            LitAPIStatus.OK,
            LoopResponseType.STREAMING,
        )

    def _keep_beating(self) -> None:
        while not self.ending.wait(BEAT_S):
            self.tell_state()

    def tell_state(self) -> None:
        state = WorkerState(
            worker=self.worker,
            epoch=self.epoch,
            pid=os.getpid(),
            beat=time.monotonic(),
            busy_s=self.steps.busy_s,
            snapshot=self.steps.snapshot,
            queue_silent_s=max(0.0, time.monotonic() - self.queue_heard - READ_S),
        )
        try:
            write_state(self.run_dir, state)
        except Exception:  # a full disk, a folder that is gone: neither may end the beat for good
            logger.exception("The worker's state could not be written")
