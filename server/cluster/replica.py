"""One replica of the engine: a base on a device, asked by any HTTP replica of the cluster.

A request comes as a message with how long it has waited and may still take, since the clocks of
two machines have nothing in common, and its events go back as a stream. The replica reads the
registry itself, so it knows which versions are pinned and which have a name without being told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from adapters.registry.adapter_bytes import open_store
from adapters.registry.names import POLL_S, Names
from adapters.registry.registry import Registry
from server.cluster.engine_thread import EngineThread
from server.cluster.metric_files import count_on_node
from server.edge.link.engine_like import ENGINE_FAILED, build_engine
from server.messages import TERMINAL, Cancel, Event, Failure, Message, Pin, Request
from server.options import EngineOptions

logger = logging.getLogger(__name__)

VERSION_CHARACTERS: Final = 16  # of a digest: as many as routers need to tell versions apart


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What a replica of the engine is made of.

    Args:
        engine: ``module:attribute`` of what builds it.
        options: For it.
        database: Of the registry, as SQLAlchemy names it.
        base_digest: Of the base, as the registry has it.
        max_step_s: A step that takes longer means that the engine hangs.
        metrics_dir: Of the files of counts of this node.
        log_level: Least severity that is logged.
        log_format: ``text`` or ``json``.
    """

    engine: str
    options: EngineOptions
    database: str
    base_digest: str
    max_step_s: float
    metrics_dir: Path
    log_level: str
    log_format: Literal["text", "json"] = "text"


@dataclass(frozen=True, slots=True)
class Addressed:
    """Whom a call is for: the first argument of calls that are no requests; the router reads it.

    Args:
        replica: That one; None for any.
        version: Where requests for this adapter version would go.
    """

    replica: str | None = None
    version: str | None = None


class EngineReplica:
    """See the module. A Ray Serve deployment makes it; nothing here knows Ray.

    Args:
        plan: What it is made of.
        name: Of the replica, as routers know it.
    """

    def __init__(self, plan: ReplicaPlan, name: str = "") -> None:
        count_on_node("engine", plan.metrics_dir)
        self.plan = plan
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals: dict[str, asyncio.Queue[Event]] = {}
        self._closing = threading.Event()
        engine = build_engine(plan.engine, plan.options)
        self._thread = EngineThread(engine, self._arrived, _end_replica)
        threading.Thread(target=self._follow_registry, name="registry", daemon=True).start()

    def close(self) -> None:
        """End the engine; what still runs fails."""
        self._closing.set()
        self._thread.close()

    async def answer(self, request: Request, waited_s: float, left_s: float | None) -> Event:
        """Run a request to its end and return its terminal event.

        Args:
            request: Its id is its own in this replica.
            waited_s: Since it was submitted.
            left_s: Until its deadline; None without one.
        """
        async with aclosing(self.stream(request, waited_s, left_s)) as batches:
            async for events in batches:
                if isinstance(events[-1], TERMINAL):
                    return events[-1]
        raise AssertionError("a request ended without a terminal event")

    async def stream(
        self, request: Request, waited_s: float, left_s: float | None
    ) -> AsyncGenerator[list[Event], None]:
        """Run a request and yield its events as they come, the last one terminal.

        Leaving before the end cancels its work.
        """
        now = time.monotonic()
        self._loop = asyncio.get_running_loop()
        request = replace(
            request,
            submitted=now - waited_s,
            deadline=None if left_s is None else now + left_s,
        )
        arrivals = self._arrivals[request.id] = asyncio.Queue()
        ended = False
        self._thread.submit(request)
        try:
            while not ended:
                events = [await arrivals.get()]
                while not arrivals.empty():
                    events.append(arrivals.get_nowait())
                ended = isinstance(events[-1], TERMINAL)
                yield events
        finally:
            del self._arrivals[request.id]
            if not ended:
                self._thread.submit(Cancel(request.id))

    async def hear(self, to: Addressed, message: Message) -> bool:
        """Take a message that has no answer, and say that it came."""
        self._thread.submit(message)
        return True

    async def state(self, to: Addressed) -> dict[str, Any]:
        """How it is, for readiness, metrics and the administration."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "busy_s": self._thread.busy_s,
            "snapshot": dict(self._thread.snapshot),
        }

    def record_routing_stats(self) -> dict[str, Any]:
        """What routers are told: the versions on the device."""
        tiers = self._thread.snapshot.get("residency", {})
        return {"resident": sorted(short(one) for one, tier in tiers.items() if tier == "device")}

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica for which it fails.

        Raises:
            RuntimeError: The engine is lost, or hangs in a step.
        """
        if not self._thread.lives:
            raise RuntimeError("the engine's thread has ended")
        if self._thread.busy_s > self.plan.max_step_s:
            raise RuntimeError(f"one step has been running for {self._thread.busy_s:.0f} s")

    def _arrived(self, events: list[Event]) -> None:
        """On the engine's thread: one call of the event loop for all that a step brought."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[Event]) -> None:
        for event in events:
            arrivals = self._arrivals.get(event.id)
            if arrivals is not None:
                arrivals.put_nowait(event)

    def _follow_registry(self) -> None:
        """Thread: tell the engine which versions are pinned and have a name, when it changes."""
        names: Names | None = None
        told: Pin | None = None
        while not self._closing.wait(0.0 if told is None and names is None else POLL_S):
            try:
                if names is None:
                    registry = Registry(self.plan.database, open_store(self.plan.options.store_dir))
                    names = Names(registry, lambda: 0, base_digest=self.plan.base_digest)
                if names.refresh():
                    now = Pin(names.pinned_versions(), named=tuple(sorted(names.versions())))
                    if now != told:
                        self._thread.submit(now)
                        told = now
            except Exception as error:  # noqa: BLE001  # the database is away: try again
                logger.warning("The registry cannot be opened: %s", error)
                self._closing.wait(POLL_S)


def short(version: str) -> str:
    """A version as routers name it to each other."""
    return version[:VERSION_CHARACTERS]


def replica_lost(request: Request) -> Failure:
    """The failure of a request whose replica died."""
    return Failure(
        request.id,
        "worker_lost",
        "The engine replica died while this request ran.",
        fix="Send the request again; other replicas are there, or a new one is being started.",
    )


def _end_replica() -> None:
    """End this replica at once: those who wait hear of it, and Ray Serve starts another."""
    _end_connections()
    os._exit(ENGINE_FAILED)


def _end_connections() -> None:
    """Tell whoever waits for this process now: its sockets close when its last thread has ended,
    and threads that step back from the processor take seconds to end on a machine that is busy."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as own:
            own.shutdown(socket.SHUT_RDWR)
