"""The link to the one worker of this machine: hands requests to it and brings the answers back.

One dispatcher per HTTP process, on its event loop. It watches the worker, whose death ends every
request that it had.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.envelopes import Events, Requests, WorkerReady, request_id
from server.edge.link.link import STALE_S, Link, silence_s
from server.edge.link.thread_deaths import watched
from server.edge.link.ticket import RequestQueue, Ticket
from server.edge.link.worker_state import WorkerState, read_state
from server.messages import (
    Cancel,
    Message,
    Request,
)

logger = logging.getLogger(__name__)


TICK_S: Final = 0.25
LOOK_TICKS: Final = 4
SEND_AT_ONCE: Final = 256
REQUESTS_UID: Final = "requests"


class Dispatcher(Link):
    """See the module.

    Args:
        load: Shared between the HTTP processes.
        bounds: Of all HTTP processes together.
        processes: How many HTTP processes there are.
        run_dir: Where the worker keeps its state file.
    """

    def __init__(self, load: SharedLoad, bounds: Bounds, processes: int, run_dir: Path) -> None:
        super().__init__(load, bounds, processes)
        self.run_dir = run_dir
        self.number = 0
        self._ids = itertools.count()
        self._epoch: str | None = None
        self._dead_epoch: str | None = None  # whose end is known, if its file still is there
        self._silent = False  # a worker is there and does not say so any more
        self._lost = False  # a worker was there and is gone
        self._pidfd: int | None = None
        self._outbox: queue.SimpleQueue[tuple[str | None, Message] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sender: threading.Thread | None = None
        self._ticker: asyncio.Task[None] | None = None

    # Life

    async def start(self, number: int, requests: RequestQueue) -> None:
        """Begin to serve as HTTP process ``number``; called on its event loop."""
        self.number = self.admission.number = number
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(time.monotonic_ns())  # not those of a process before this one
        self._outbox = queue.SimpleQueue()
        self.admission.publish()
        self.load.beat(number)
        self._look(read_state(self.run_dir))
        self._sender = threading.Thread(
            target=self._send_all, args=(requests,), name="requests", daemon=True
        )
        self._sender.start()
        self._ticker = watched(self._tick(), "dispatcher-tick", self.give_up)

    async def stop(self) -> None:
        """End what still runs and let go of threads and file descriptors."""
        self.fail_all("draining", "The server is stopping.")
        if self._ticker is not None:
            self._ticker.cancel()
        self._outbox.put(None)
        if self._sender is not None:
            await asyncio.to_thread(self._sender.join, 2.0)
        self._forget_worker()

    # What endpoints use

    @property
    def engine_status(self) -> str:
        if self._epoch is None:
            return "worker_lost" if self._lost else "starting"
        return "worker_silent" if self._silent else "ready"

    @property
    def epoch(self) -> str | None:
        """Which worker is there; None when none is ready."""
        return self._epoch

    def state(self) -> WorkerState | None:
        return read_state(self.run_dir)

    def pids(self) -> Mapping[str, int]:
        state = self.state()
        found = {"main": os.getppid(), **self.load.pids()}
        if state is not None:
            found["worker-0"] = state.pid
        return {role: pid for role, pid in found.items() if pid}

    def tell(self, message: Message) -> None:
        self._post(message)

    # What comes back

    def append(self, response: list[Any]) -> None:
        """Take one message from LitServe's response task: ``[envelope, status]``."""
        envelope = response[0]
        if isinstance(envelope, WorkerReady):
            self._greet(envelope)
        elif isinstance(envelope, Events):
            for event in envelope.events:
                ticket = self._tickets.get(event.id)
                if ticket is not None:
                    self._deliver(ticket, event)
        else:
            logger.error("An unknown envelope from the worker: %r", type(envelope))

    # Inside

    def _next_id(self) -> str:
        return request_id(self.number, next(self._ids))

    def _send(self, ticket: Ticket) -> None:
        self._post(ticket.request)

    def _withdraw(self, request: Request) -> None:
        if self._epoch is not None:
            self._post(Cancel(request.id))

    def _greet(self, ready: WorkerReady) -> None:
        """Take up with a worker and watch its pid: when it dies the kernel says so at once."""
        if ready.epoch in {self._epoch, self._dead_epoch}:
            return
        try:
            pidfd = os.pidfd_open(ready.pid)
        except ProcessLookupError:
            return  # it died before we heard of it
        except OSError as error:  # no descriptor is left, for one: the next look tries again
            logger.error("The worker %d cannot be watched: %s", ready.pid, error)
            return
        if self._epoch is not None:
            self._worker_died()
        self._forget_worker()
        self._epoch, self._pidfd, self._lost = ready.epoch, pidfd, False
        assert self._loop is not None
        self._loop.add_reader(pidfd, self._worker_died)

    def _worker_died(self) -> None:
        self._dead_epoch = self._epoch
        self._forget_worker()
        self._lost = True
        logger.error("The inference worker was lost with %d requests", len(self._tickets))
        self.fail_all(
            "worker_lost",
            "The inference worker died while this request ran.",
            fix="Send the request again; a new worker is being started.",
        )

    def _forget_worker(self) -> None:
        if self._pidfd is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._pidfd = self._epoch = None

    def _post(self, message: Message) -> None:
        # The epoch goes along: what was meant for a worker that died is not run by the next one.
        self._outbox.put((self._epoch, message))

    def _send_all(self, requests: RequestQueue) -> None:
        """Thread: move messages to LitServe's queue, as many at once as are there."""
        ending = False
        while not ending and (first := self._outbox.get()) is not None:
            batch = [first]
            while len(batch) < SEND_AT_ONCE and not self._outbox.empty():
                more = self._outbox.get()
                if more is None:
                    ending = True  # after what came before it
                    break
                batch.append(more)
            epoch = self._epoch
            messages = tuple(message for meant_for, message in batch if meant_for == epoch)
            if epoch is None or not messages:
                continue
            envelope = Requests(epoch, messages, os.getpid())
            requests.put((self.number, REQUESTS_UID, time.monotonic(), envelope))

    def _look(self, state: WorkerState | None) -> None:
        """Take up with the worker that the state file tells of, should its greeting be lost."""
        if state is not None:
            self._greet(WorkerReady(state.epoch, state.pid))
        self._silent = self._epoch is not None and silence_s(state) > STALE_S

    async def _tick(self) -> None:
        for tick in itertools.count():
            await asyncio.sleep(TICK_S)
            self.load.beat(self.number)
            if tick % LOOK_TICKS == 0:  # the state may be large: it names every resident adapter
                self._look(read_state(self.run_dir))
            if self.load.phase is Phase.STOPPING and self._tickets:
                self.fail_all("draining", "The server stopped before the answer was there.")
