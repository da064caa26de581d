"""What every way to an engine has in common: whoever admits a request sees to it that it ends.

A link bounds what may wait, watches deadlines and clients, and ends every admitted request: with
the engine's answer, or with a failure that says why there is none. How a request gets to an engine,
and which engines there are, is the affair of its subclasses. Batching and fairness are the
engine's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from adapters.tasks import Lane
from server.edge.admit.admission import Admission
from server.edge.admit.bounds import Bounds
from server.edge.admit.callers import current_caller
from server.edge.admit.key_usage import SharedUsage
from server.edge.admit.predicted_wait import lane_of
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.ticket import Ticket
from server.edge.link.worker_state import WorkerState
from server.errors import Refusal
from server.messages import (
    EncodeResult,
    Event,
    Failure,
    GenerateResult,
    Message,
    Origin,
    Request,
)

logger = logging.getLogger(__name__)

EXIT_WITHIN_S: Final = 5
STALE_S: Final = 5.0  # an engine that has not spoken for so long is not ready
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


class Link(ABC):
    """See the module. One in an HTTP process, used on its event loop.

    Args:
        load: Shared between the HTTP processes.
        bounds: Of all HTTP processes together.
        processes: How many HTTP processes there are.
    """

    def __init__(self, load: SharedLoad, bounds: Bounds, processes: int) -> None:
        self.load = load
        self.admission = Admission(load, bounds, processes)
        self.processes = processes
        self.on_event: Callable[[Request, Event], None] | None = None
        self.on_predicted: Callable[[Lane, float], None] | None = None  # with the wait, in seconds
        self.key_usage: SharedUsage | None = None  # counts what requests of a key come to
        self.end: Callable[[], None] = end_in_order
        self._tickets: dict[str, Ticket] = {}
        self._broken = False  # a part of this process died, and it is about to end

    # What a subclass brings

    @property
    @abstractmethod
    def engine_status(self) -> str:
        """``ready``, or the code of the refusal that says why no engine would answer now."""

    @property
    @abstractmethod
    def epoch(self) -> str | None:
        """Who is to be told which versions have names, and anew when it changes; None where
        nobody is."""

    @abstractmethod
    def state(self) -> WorkerState | None:
        """What the engine last said of itself; of all engines together, where there are several."""

    @abstractmethod
    def pids(self) -> Mapping[str, int]:
        """Process ids by role, of the processes on this machine."""

    @abstractmethod
    def tell(self, message: Message) -> None:
        """Send something that has no answer, such as Preload; lost when no engine is there."""

    @abstractmethod
    def _next_id(self) -> str:
        """An id that no other request has."""

    @abstractmethod
    def _send(self, ticket: Ticket) -> None:
        """Have a request answered; its events are delivered by and by."""

    @abstractmethod
    def _withdraw(self, request: Request) -> None:
        """Nobody waits for a request any more."""

    def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """What each of several engines said of itself, by name; {} where there is one."""
        return {}

    def routed(self) -> Mapping[str, int]:
        """Requests by why they went to which of several engines; {} where there is one."""
        return {}

    # What endpoints use

    def silent_s(self) -> float:
        """How long ago an engine last spoke."""
        return silence_s(self.state())

    @property
    def status(self) -> str:
        """``ready``, or the code of the refusal that a request would get now."""
        if self.load.phase is not Phase.SERVING:
            return "draining"
        return "restarting" if self._broken else self.engine_status

    @property
    def bounds(self) -> Bounds:
        """Of all HTTP processes together; may be replaced while requests run."""
        return self.admission.bounds

    @bounds.setter
    def bounds(self, bounds: Bounds) -> None:
        self.admission.bounds = bounds

    def check_early(
        self, adapter: str | None, lane: Lane | None = None, deadline: float | None = None
    ) -> None:
        """Refuse what would be refused whatever its body says, before that is read.

        Args:
            adapter: As the query names it; None where it does not.
            lane: That the path is for; None where that is not known.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            Refusal: starting, draining, restarting, worker_lost, worker_silent, overloaded or
                wait_too_long.
        """
        self._check_status()
        self.admission.check_early(adapter, lane, deadline)

    @contextmanager
    def admit(self, request: Request) -> Iterator[Ticket]:
        """Send a request to the worker for the length of a ``with`` block.

        The id of ``request`` is replaced. Leaving the block before the terminal event, for whatever
        reason, cancels the work.

        Raises:
            Refusal: starting, draining, restarting, worker_lost, worker_silent, overloaded,
                wait_too_long, deadline_exceeded, or rate_limit_exceeded or request_too_large by the
                key's quotas.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        self._check_quota(request.tokens)
        caller = current_caller()
        origin = Origin()
        if caller is not None:
            origin = caller.origin
            caller.adapter, caller.version = request.adapter, request.version
        request = replace(request, id=self._next_id(), origin=origin)
        if caller is not None and caller.key is not None and self.key_usage is not None:
            self.key_usage.reserve(caller.key, request.id, request.tokens)
        ticket = Ticket(request)
        self._tickets[request.id] = ticket
        self.admission.add(request)
        timer = None
        if request.deadline is not None:
            remaining_s = max(0.0, request.deadline - time.monotonic())
            timer = loop.call_later(remaining_s, self._expire, ticket)
        self._send(ticket)
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
            Refusal: request_too_large, or rate_limit_exceeded where the key has not enough tokens
                left for all of them.
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
            self._check_quota(tokens)
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
            self._withdraw(ticket.request)
            self._deliver(ticket, Failure(ticket.request.id, "cancelled", "The client left."))

    @property
    def running(self) -> int:
        return len(self._tickets)

    # Ends

    def fail_all(self, code: str, message: str, fix: str | None = None) -> None:
        """End every request that runs with the same failure, and its work where a worker lives."""
        for ticket in list(self._tickets.values()):
            if not ticket.ended:
                self._withdraw(ticket.request)
            self._deliver(ticket, Failure(ticket.request.id, code, message, fix=fix))

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
        lane = lane_of(request)
        wait = self.admission.check_wait(lane, request.adapter, request.tokens, request.deadline)
        if wait is not None and self.on_predicted is not None:
            self.on_predicted(lane, wait.queue_s)

    def _check_quota(self, tokens: int) -> None:
        caller = current_caller()
        if caller is not None and caller.key is not None and self.key_usage is not None:
            self.key_usage.check_tokens(caller.key, tokens)

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if ticket.ended:
            return
        ticket.put(event)
        if isinstance(event, EncodeResult | GenerateResult):
            self.admission.answered(ticket.request, event)
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
            self._withdraw(ticket.request)
            self.admission.too_late(ticket.request)
            self._deliver(
                ticket,
                Failure(
                    ticket.request.id,
                    "deadline_exceeded",
                    "The deadline passed before the answer was there.",
                    fix="Ask for less, allow more time, or send fewer requests at once.",
                ),
            )


def silence_s(state: WorkerState | None) -> float:
    """How long ago this was said; for ever where nothing was."""
    return math.inf if state is None else time.monotonic() - state.beat
