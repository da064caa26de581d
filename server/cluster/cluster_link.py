"""The link to all engines of a cluster, over a deployment handle of Ray Serve.

Which replica gets a request is decided by the router behind the handle. A replica that dies fails
what it had, by its connections or, where these stay open, by its silence; a request that only reads
is then asked once more of another, since nothing of its answer was sent. A generation is not: its
tokens may be out already.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Coroutine, Mapping
from contextvars import Context
from dataclasses import replace
from typing import Any, Final, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from server.cluster.merged_state import merged
from server.cluster.replica import Addressed, replica_lost
from server.cluster.router_table import ROUTERS
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.link.link import STALE_S, Link
from server.edge.link.thread_deaths import watched
from server.edge.link.ticket import Ticket
from server.edge.link.worker_state import WorkerState
from server.messages import (
    EncodeRequest,
    Event,
    Failure,
    GenerateRequest,
    Message,
    Pin,
    Preload,
    Request,
    log_fields,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_EVERY_S: Final = 0.25
QUIET_S: Final = 0.5  # a replica that has requests and says nothing for so long may be gone
NOBODY_S: Final = 1.0  # for which no replica is there: a list may be empty between two others
ASK_EVERY_S: Final = 1.0
ASK_WITHIN_S: Final = 3.0  # a replica that takes longer to say how it is, is silent
ASKED_AT_MOST: Final = 2  # of a request that only reads


class ClusterLink(Link):
    """See the module.

    Args:
        load: Of this process alone.
        bounds: Of this process.
        engines: Ray Serve's handle to the engine replicas.
        deployment: Its name.
        name: Of this process; no other has it.
    """

    def __init__(
        self, load: SharedLoad, bounds: Bounds, engines: Any, deployment: str, name: str
    ) -> None:
        super().__init__(load, bounds, processes=1)
        self._engines = engines
        self._streams = engines.options(stream=True)
        self._deployment = deployment
        self._name = name
        self._ids = itertools.count()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sent_as: dict[str, str] = {}  # by the id of a request: that of its present attempt
        self._lost: set[str] = set()  # requests whose replica is gone, while they end
        self._nobody_since: float | None = None  # monotonic
        self._said: dict[str, tuple[float, dict[str, Any]]] = {}  # by replica: when, and what
        self._background: list[asyncio.Task[None]] = []
        self._followed: dict[str | None, asyncio.Task[None]] = {}  # by replica
        self._others: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Begin to serve; on the event loop."""
        self.admission.publish()
        self._background = [
            watched(self._tick(), "link-tick", self.give_up),
            watched(self._follow(), "link-follow", self.give_up),
        ]

    async def stop(self) -> None:
        """End what still runs."""
        self.fail_all("draining", "The server is stopping.")
        for task in (*self._background, *self._followed.values()):
            task.cancel()

    # What a link brings

    @property
    def engine_status(self) -> str:
        newest = max((at for at, _ in self._said.values()), default=None)
        if newest is None:
            return "starting"
        if self._nobody_is_there():
            return "worker_lost"
        return "worker_silent" if time.monotonic() - newest > STALE_S else "ready"

    @property
    def epoch(self) -> str | None:
        return None  # replicas read the registry themselves

    def state(self) -> WorkerState | None:
        said = self._heard()
        if not said:
            return None
        newest = max(at for at, _ in said.values())
        return WorkerState(
            worker=0,
            epoch=self._deployment,
            pid=0,
            beat=newest,
            busy_s=min(one["busy_s"] for _, one in said.values()),
            snapshot=merged([one["snapshot"] for _, one in said.values()]),
        )

    def pids(self) -> Mapping[str, int]:
        return {"http": os.getpid()}

    def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: one["snapshot"] for name, (_, one) in self._heard().items()}

    def routed(self) -> Mapping[str, int]:
        router = ROUTERS.get(self._deployment)
        return {} if router is None else dict(router.routed)

    def tell(self, message: Message) -> None:
        """A preload goes where requests for it would go; everything else to every replica."""
        if isinstance(message, Pin):
            return
        if isinstance(message, Preload):
            self._aside(self._call("hear", Addressed(None, message.version), message))
        else:
            for name in self._names():
                self._aside(self._call("hear", Addressed(name), message))

    def _next_id(self) -> str:
        return f"{self._name}.{next(self._ids)}"

    def _send(self, ticket: Ticket) -> None:
        task = _own_call(self._carry(ticket), "request")
        self._tasks[ticket.request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(ticket.request.id, None))

    def _withdraw(self, request: Request) -> None:
        task = self._tasks.get(request.id)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    # Inside

    async def _carry(self, ticket: Ticket) -> None:
        """Have one request answered, and end it whatever happens."""
        request = ticket.request
        for attempt in range(1, ASKED_AT_MOST + 1):
            sent_as = f"{request.id}.{attempt}"
            self._sent_as[request.id] = sent_as
            try:
                await self._ask(ticket, replace(request, id=sent_as))
                return
            except asyncio.CancelledError:
                if self._is_left(request):
                    raise
                reason = "it is silent, or took the call back"
            except (RayActorError, DeploymentUnavailableError) as error:
                reason = type(error).__name__
            except Exception as error:
                logger.exception(
                    "Request %s failed on its way", request.id, extra=log_fields(request)
                )
                kind = "worker_lost" if isinstance(error, RayServeException) else "internal"
                text = "The request could not be brought to an engine replica, or back."
                self._deliver(ticket, Failure(request.id, kind, text, found=type(error).__name__))
                return
            finally:
                del self._sent_as[request.id]
                self._lost.discard(request.id)
            logger.warning(
                "Request %s lost its replica: %s", request.id, reason, extra=log_fields(request)
            )
            if attempt == ASKED_AT_MOST or not isinstance(request, EncodeRequest):
                self._deliver(ticket, replica_lost(request))
                return

    def _is_left(self, request: Request) -> bool:
        """Whether the present task was cancelled for that nobody waits any more, and not for that
        the replica is gone, after which it goes on."""
        task = asyncio.current_task()
        assert task is not None
        if request.id in self._lost:
            self._lost.discard(request.id)
            return task.uncancel() > 0
        return task.cancelling() > 0

    async def _ask(self, ticket: Ticket, request: Request) -> None:
        now = time.monotonic()
        left_s = None if request.deadline is None else request.deadline - now
        times = (max(0.0, now - request.submitted), left_s)
        streams = isinstance(request, GenerateRequest) and request.stream
        asked = self._streams.stream if streams else self._engines.answer
        response = asked.remote(request, *times)
        complete = False  # the ticket says less: whoever leaves ends it before this task
        try:
            if streams:
                async for events in response:
                    for event in events:
                        self._pass_on(ticket, event)
            else:
                self._pass_on(ticket, await response)
            complete = True
        finally:
            if not complete:
                response.cancel()
            router = ROUTERS.get(self._deployment)
            if router is not None:
                router.placed.take(request.id)

    def _pass_on(self, ticket: Ticket, event: Event) -> None:
        router = ROUTERS.get(self._deployment)
        replica = None if router is None else router.placed.where(event.id)
        if replica is not None:
            replica.heard = time.monotonic()
        self._deliver(ticket, replace(event, id=ticket.request.id))

    def _nobody_is_there(self) -> bool:
        """Whether no replica has been there for a while."""
        router = ROUTERS.get(self._deployment)
        if router is None or router.reachable():
            self._nobody_since = None
            return False
        now = time.monotonic()
        if self._nobody_since is None:
            self._nobody_since = now
        return now - self._nobody_since >= NOBODY_S

    def _heard(self) -> dict[str, tuple[float, dict[str, Any]]]:
        """Replicas that have spoken lately."""
        since = time.monotonic() - STALE_S
        return {name: said for name, said in self._said.items() if said[0] > since}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                self._look()
            except Exception:
                # What could not be seen this time is seen the next: nobody else looks.
                logger.exception("The engine replicas could not be looked at")

    def _look(self) -> None:
        """End what waits for nobody."""
        if self.load.phase is Phase.STOPPING and self._tickets:
            self.fail_all("draining", "The server stopped before the answer was there.")
        router = ROUTERS.get(self._deployment)
        if router is None:
            return
        now = time.monotonic()
        gone: set[str] = set()
        for replica, requests in router.placed.by_replica().items():
            if replica.name in router.silent:
                gone.update(requests)
            elif now - replica.heard > QUIET_S:
                router.look_for(replica)
        nobody = self._nobody_is_there()
        for ticket in list(self._tickets.values()):
            sent_as = self._sent_as.get(ticket.request.id)
            if ticket.ended or sent_as is None:
                continue
            if sent_as in gone:
                self._lost.add(ticket.request.id)
                self._tasks[ticket.request.id].cancel()
            elif nobody and router.placed.where(sent_as) is None:
                # It waits for a replica. Those that have one end with it, or with its answer.
                self._withdraw(ticket.request)
                self._deliver(ticket, none_there(ticket.request))

    async def _follow(self) -> None:
        """Have every replica asked how it is, for ever, each by itself: one that is slow holds up
        no other."""
        while True:
            names = self._names()
            for name in names - self._followed.keys():
                self._followed[name] = _own_call(self._follow_one(name), "follow")
            for name in self._followed.keys() - names:
                self._followed.pop(name).cancel()
            heard = self._heard()
            if heard:  # what is old says nothing, but that something was there
                self._said = heard
            await asyncio.sleep(WATCH_EVERY_S)

    async def _follow_one(self, name: str | None) -> None:
        while True:
            found = await self._call("state", Addressed(name))
            if found is not None:
                self._said[found["name"]] = (time.monotonic(), found)
            await asyncio.sleep(ASK_EVERY_S)

    def _names(self) -> set[str | None]:
        """Of all replicas; before the first call there is no router, and any will do."""
        router = ROUTERS.get(self._deployment)
        return {None} if router is None else {one.unique_id for one in router.curr_replicas}

    async def _call(self, method: str, to: Addressed, *arguments: Any) -> Any:
        """Call a replica; None where it gives no answer in time."""
        response = None
        try:
            response = getattr(self._engines, method).remote(to, *arguments)
            return await asyncio.wait_for(response, ASK_WITHIN_S)
        except BaseException as error:
            if response is not None:
                response.cancel()
            if not isinstance(error, Exception):
                raise
            # Who is silent is asked again a second later; a message that is lost is not sent again.
            level = logging.WARNING if method == "hear" else logging.DEBUG
            logger.log(level, "Replica %s does not answer %s: %r", to.replica, method, error)
            return None

    def _aside(self, call: Coroutine[Any, Any, Any]) -> None:
        """Have something done that nobody waits for."""
        task = _own_call(call, "aside")
        self._others.add(task)
        task.add_done_callback(self._others.discard)


def none_there(request: Request) -> Failure:
    """The failure of a request that waits for a replica where none is left."""
    return Failure(
        request.id,
        "worker_lost",
        "No engine replica is there.",
        fix="Send the request again; a new replica is being started.",
    )


def _own_call(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """A task for calls of replicas, which knows nothing of the HTTP request that it is made for.

    Ray Serve gives all calls that are made for one HTTP request the same internal id, and its
    router finds calls by that: of several that wait at once it would route one, and look for the
    others again and again, in the few tasks that route everything.
    """
    return asyncio.create_task(work, name=name, context=Context())
