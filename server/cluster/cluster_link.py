"""The link to all engines of a cluster, over a deployment handle of Ray Serve.

Which replica gets a request is decided by the router behind the handle. A replica that dies fails
what it had at once; a request that only reads is then asked once more of another, since nothing of
its answer was sent. A generation is not: its tokens may be out already.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

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

WATCH_EVERY_S: Final = 0.25
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
        self._said: dict[str, tuple[float, dict[str, Any]]] = {}  # by replica: when, and what
        self._background: list[asyncio.Task[None]] = []
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
        for task in self._background:
            task.cancel()

    # What a link brings

    @property
    def engine_status(self) -> str:
        newest = max((at for at, _ in self._said.values()), default=None)
        if newest is None:
            return "starting"
        if not self._replicas_there():
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
            self._aside(self._engines.hear.remote(Addressed(None, message.version), message))
        else:
            self._aside(self._everywhere("hear", message))

    def _next_id(self) -> str:
        return f"{self._name}.{next(self._ids)}"

    def _send(self, ticket: Ticket) -> None:
        task = asyncio.create_task(self._carry(ticket), name="request")
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
            try:
                await self._ask(ticket, replace(request, id=f"{request.id}.{attempt}"))
                return
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning(
                    "Request %s lost its replica: %s",
                    request.id,
                    type(error).__name__,
                    extra=log_fields(request),
                )
                if attempt == ASKED_AT_MOST or not isinstance(request, EncodeRequest):
                    self._deliver(ticket, replica_lost(request))
                    return
            except Exception as error:
                logger.exception(
                    "Request %s failed on its way", request.id, extra=log_fields(request)
                )
                kind = "worker_lost" if isinstance(error, RayServeException) else "internal"
                text = "The request could not be brought to an engine replica, or back."
                self._deliver(ticket, Failure(request.id, kind, text, found=type(error).__name__))
                return

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

    def _pass_on(self, ticket: Ticket, event: Event) -> None:
        self._deliver(ticket, replace(event, id=ticket.request.id))

    def _replicas_there(self) -> bool:
        router = ROUTERS.get(self._deployment)
        return router is None or router.reachable()

    def _heard(self) -> dict[str, tuple[float, dict[str, Any]]]:
        """Replicas that have spoken lately."""
        since = time.monotonic() - STALE_S
        return {name: said for name, said in self._said.items() if said[0] > since}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if self._tickets and self.engine_status == "worker_lost":
                # What had a replica has failed with it; this is what waits for one.
                self.fail_all(
                    "worker_lost",
                    "No engine replica is there.",
                    fix="Send the request again; a new replica is being started.",
                )
            if self.load.phase is Phase.STOPPING and self._tickets:
                self.fail_all("draining", "The server stopped before the answer was there.")

    async def _follow(self) -> None:
        """Ask every replica how it is, for ever; one that is slow holds up no other."""
        while True:
            for one in await self._everywhere("state"):
                self._said[one["name"]] = (time.monotonic(), one)
            heard = self._heard()
            if heard:  # what is old says nothing, but that something was there
                self._said = heard
            await asyncio.sleep(ASK_EVERY_S)

    async def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """Call every replica; the answers of those that gave one in time."""
        router = ROUTERS.get(self._deployment)
        # Before the first call there is no router, and any replica will do.
        names = [one.unique_id for one in router.curr_replicas] if router is not None else [None]

        async def call(name: str | None) -> Any:
            response = getattr(self._engines, method).remote(Addressed(name), *arguments)
            try:
                return await asyncio.wait_for(response, ASK_WITHIN_S)
            except BaseException as error:
                response.cancel()
                if not isinstance(error, Exception):
                    raise
                logger.debug("Replica %s does not answer %s: %r", name, method, error)
                return None

        found = await asyncio.gather(*(call(one) for one in names))
        return [one for one in found if one is not None]

    def _aside(self, awaitable: Any) -> None:
        """Wait for something that nobody waits for."""

        async def wait() -> None:
            try:
                await awaitable
            except Exception as error:  # noqa: BLE001  # it has no answer
                logger.warning("A message did not reach the engines: %s", error)

        task = asyncio.create_task(wait(), name="aside")
        self._others.add(task)
        task.add_done_callback(self._others.discard)
