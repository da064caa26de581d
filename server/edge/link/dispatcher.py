"""Admits requests, hands them to the worker and brings the answers back.

One dispatcher per HTTP process, on its event loop. It bounds what may wait, watches deadlines,
clients and the worker, and sees to it that every admitted request ends: with the worker's answer,
or with a failure that says why there is none. Batching and fairness are the engine's affair.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from server.edge.admit.admission import Admission
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.envelopes import Events, Requests, WorkerReady, request_id
from server.edge.link.thread_deaths import watched
from server.edge.link.ticket import RequestQueue, Ticket
from server.edge.link.worker_state import WorkerState, read_state
from server.errors import Refusal
from server.messages import (
    Cancel,
    Event,
    Failure,
    Message,
    Request,
)

logger = logging.getLogger(__name__)


TICK_S: Final = 0.25
LOOK_TICKS: Final = 4
STALE_S: Final = 5.0  # a worker that has not written its state for so long is not ready
SEND_AT_ONCE: Final = 256
EXIT_WITHIN_S: Final = 5
REQUESTS_UID: Final = "requests"
WHY_NOT: Final = {
    "draining": "The server is stopping and takes no new requests.",
    "restarting": "This HTTP process is being restarted; others may be there.",
    "starting": "The base model is still being loaded.",
    "worker_lost": "The inference worker is being restarted.",
    "worker_silent": "The inference worker gives no sign of life.",
}


def end_in_order() -> None:
    """Have this process finish its answers and end, as when the main process asks for it, but
    within seconds: its successor waits for that."""
    signal.alarm(EXIT_WITHIN_S)  # which ends it whatever it waits for
    os.kill(os.getpid(), signal.SIGTERM)


class Dispatcher:
    """See the module.

    Args:
        load: Shared between the HTTP processes.
        bounds: Of all HTTP processes together.
        processes: How many HTTP processes there are.
        run_dir: Where the worker keeps its state file.
    """

    def __init__(self, load: SharedLoad, bounds: Bounds, processes: int, run_dir: Path) -> None:
        self.load = load
        self.admission = Admission(load, bounds, processes)
        self.run_dir = run_dir
        self.processes = processes
        self.number = 0
        self.on_event: Callable[[Request, Event], None] | None = None
        self.end: Callable[[], None] = end_in_order
        self._ids = itertools.count()
        self._tickets: dict[str, Ticket] = {}
        self._epoch: str | None = None
        self._dead_epoch: str | None = None  # whose end is known, if its file still is there
        self._broken = False  # a part of this process died, and it is about to end
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
            target=self._send, args=(requests,), name="requests", daemon=True
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

    def give_up(self, part: str) -> None:
        """A part that this process cannot do without has died: answer all that runs, and end.

        Called on the event loop. The main process starts a successor, and the worker cancels what
        this process had it do.
        """
        if self._broken:
            return
        self._broken = True
        logger.error("This HTTP process ends without its %s", part)
        self.fail_all(
            "restarting",
            "The HTTP process failed while this request ran.",
            fix="Send the request again; a new process is being started.",
        )
        self.end()

    # What endpoints use

    @property
    def status(self) -> str:
        """``ready``, or the code of the refusal that a request would get now."""
        if self.load.phase is not Phase.SERVING:
            return "draining"
        if self._broken:
            return "restarting"
        if self._epoch is None:
            return "worker_lost" if self._lost else "starting"
        return "worker_silent" if self._silent else "ready"

    @property
    def bounds(self) -> Bounds:
        """Of all HTTP processes together; may be replaced while requests run."""
        return self.admission.bounds

    @bounds.setter
    def bounds(self, bounds: Bounds) -> None:
        self.admission.bounds = bounds

    @property
    def epoch(self) -> str | None:
        """Which worker is there; None when none is ready."""
        return self._epoch

    def silent_s(self) -> float:
        """How long ago the worker last wrote its state."""
        return _silent_s(read_state(self.run_dir))

    def check_early(self, adapter: str | None) -> None:
        """Refuse what would be refused whatever its body says, before that is read.

        Args:
            adapter: As the query names it; None where it does not.

        Raises:
            Refusal: starting, draining, restarting, worker_lost, worker_silent or overloaded.
        """
        self._check_status()
        self.admission.check_early(adapter)

    @contextmanager
    def admit(self, request: Request) -> Iterator[Ticket]:
        """Send a request to the worker for the length of a ``with`` block.

        The id of ``request`` is replaced. Leaving the block before the terminal event, for whatever
        reason, cancels the work.

        Raises:
            Refusal: starting, draining, restarting, worker_lost, worker_silent, overloaded or
                deadline_exceeded.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        request = replace(request, id=request_id(self.number, next(self._ids)))
        ticket = Ticket(request)
        self._tickets[request.id] = ticket
        self.admission.add(request)
        timer = None
        if request.deadline is not None:
            remaining_s = max(0.0, request.deadline - time.monotonic())
            timer = loop.call_later(remaining_s, self._expire, ticket)
        self._post(request)
        try:
            yield ticket
        finally:
            if timer is not None:
                timer.cancel()
            if not ticket.ended:
                self.cancel(ticket)
            self._release(ticket)

    def check_fits(self, requests: Sequence[Request], field: str) -> None:
        """Refuse requests of one call that could not run together on an idle server either.

        Args:
            requests: All of one call, for one adapter.
            field: Of the body, for the error.

        Raises:
            Refusal: request_too_large.
        """
        most = min(self.bounds.requests, self.bounds.share(self.processes))
        most_tokens = min(
            self.bounds.tokens, self.bounds.token_share(self.processes) or self.bounds.tokens
        )
        tokens = sum(request.tokens for request in requests)
        if len(requests) > most:
            found, expected = f"{len(requests)} generations", f"at most {most}"
        elif len(requests) > 1 and tokens > most_tokens:
            found, expected = f"{tokens} tokens", f"at most {most_tokens}"
        else:
            return
        raise Refusal.because(
            "request_too_large",
            "The request asks for more than the server ever runs at once.",
            found=found,
            expected=expected,
            fix="Send several smaller requests.",
            field=field,
        )

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits any more: tell the worker, and end the ticket."""
        if not ticket.ended:
            self._post(Cancel(ticket.request.id))
            self._deliver(ticket, Failure(ticket.request.id, "cancelled", "The client left."))

    def tell(self, message: Message) -> None:
        """Send something that has no answer, such as Preload; lost when no worker is there."""
        self._post(message)

    @property
    def running(self) -> int:
        return len(self._tickets)

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

    def fail_all(self, code: str, message: str, fix: str | None = None) -> None:
        """End every request that runs with the same failure, and its work where a worker lives."""
        for ticket in list(self._tickets.values()):
            if self._epoch is not None and not ticket.ended:
                self._post(Cancel(ticket.request.id))
            self._deliver(ticket, Failure(ticket.request.id, code, message, fix=fix))

    # Inside

    def _check_status(self) -> None:
        status = self.status
        if status != "ready":
            raise Refusal.because(status, WHY_NOT[status], fix="Try again in a few seconds.")

    def _check(self, request: Request) -> None:
        self._check_status()
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise Refusal.because("deadline_exceeded", "The deadline passed before admission.")
        self.admission.check(request.adapter, request.tokens, request.pixel_bytes)

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if ticket.ended:
            return
        ticket.put(event)
        if self.on_event is not None:
            try:
                self.on_event(ticket.request, event)
            except Exception:  # a count may be lost, an answer or those behind it may not
                logger.exception("An event could not be counted")

    def _release(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request.id]
        self.admission.remove(ticket.request)

    def _expire(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self._post(Cancel(ticket.request.id))
            self._deliver(
                ticket,
                Failure(
                    ticket.request.id,
                    "deadline_exceeded",
                    "The deadline passed before the answer was there.",
                    fix="Ask for less, allow more time, or send fewer requests at once.",
                ),
            )

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

    def _send(self, requests: RequestQueue) -> None:
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
        self._silent = self._epoch is not None and _silent_s(state) > STALE_S

    async def _tick(self) -> None:
        for tick in itertools.count():
            await asyncio.sleep(TICK_S)
            self.load.beat(self.number)
            if tick % LOOK_TICKS == 0:  # the state may be large: it names every resident adapter
                self._look(read_state(self.run_dir))
            if self.load.phase is Phase.STOPPING and self._tickets:
                self.fail_all("draining", "The server stopped before the answer was there.")


def _silent_s(state: WorkerState | None) -> float:
    return math.inf if state is None else time.monotonic() - state.beat
