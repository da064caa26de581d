"""The LitServer: one FastAPI app, its processes, and the supervision that LitServe leaves out.

What is replaced, and why: LitServe registers three pages of its own and waits for the worker before
it listens (here the pages are ours, and clients get 503 `starting`); its HTTP processes die
unnoticed, its monitor cannot reach the requests of another process, restarts without pause and
leaves orphans when it is killed. Queues, transport, worker start and the response task are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from functools import partial
from multiprocessing.context import ForkProcess
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from litserve import LitServer
from litserve.server import response_queue_to_buffer
from starlette.middleware.cors import CORSMiddleware

from server.edge.admit.connections import Connection, ConnectionLimits, make_room_for_connections
from server.edge.endpoints.application import add_endpoints, describe_app
from server.edge.endpoints.cross_origin import cors_options
from server.edge.endpoints.middleware import RequestMiddleware
from server.edge.endpoints.routes import Endpoint
from server.edge.link.thread_deaths import watch_threads, watched
from server.edge.litserve.api import HiraAPI
from server.edge.litserve.spec import HiraSpec
from server.edge.service import Service
from server.metrics import count_as

logger = logging.getLogger(__name__)

CLOSE_CONNECTIONS_S: Final = (
    2.0  # for an HTTP process whose requests have ended, to close its connections
)
CHORE_S: Final = 1.0
JOIN_S: Final = 10.0  # from SIGTERM to SIGKILL for an HTTP process


class AnswersLost(Exception):
    """Answers of the worker did not arrive: who waits for them is not known."""


class HttpServer(uvicorn.Server):
    """uvicorn in a child: ends by SIGTERM from the main process, not by Ctrl-C of the terminal.

    Args:
        config: Of uvicorn.
        niceness: By how much the process gives way to the worker.
    """

    def __init__(self, config: uvicorn.Config, niceness: int) -> None:
        super().__init__(config)
        self._niceness = niceness

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        os.nice(self._niceness)  # before there are threads, which take it over
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until it can end in order
        super().run(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signal.signal(signal.SIGTERM, self.handle_exit)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield


class HiraServer(LitServer):
    """See the module.

    Args:
        api: The one LitAPI.
        service: Shared by all endpoints.
        routes: Endpoints beside the LitSpec's: admin, health, metrics.
        version: Of this package.
    """

    def __init__(
        self, api: HiraAPI, service: Service, routes: Sequence[Endpoint], version: str
    ) -> None:
        self.service = service
        self.routes = routes
        # Read by the supervisor: sockets and settings to start an HTTP process with.
        self.start_http: Callable[[int], ForkProcess] | None = None
        # Called in the main thread when all processes are started; returns when they shall end.
        self.supervise: Callable[[dict[int, ForkProcess]], None] | None = None
        # Called about once a second in a thread of the first HTTP process.
        self.chore: Callable[[], None] = lambda: None
        self.queues: Any = None  # the process of LitServe's queues
        cors = cors_options(service.settings)
        outer: list[tuple[Any, dict[str, Any]]] = [] if cors is None else [(CORSMiddleware, cors)]
        super().__init__(
            api,
            accelerator="cpu",  # one worker: the engine chooses its device by its own options
            devices=1,
            timeout=False,  # deadlines are the dispatcher's
            restart_workers=True,
            middlewares=[(RequestMiddleware, {"service": service}), *outer],
        )
        self.uvicorn_graceful_timeout = service.settings.drain_s + JOIN_S
        describe_app(self.app, version)

    @property
    def spec(self) -> HiraSpec:
        (api,) = self.litapi_connector
        assert isinstance(api.spec, HiraSpec)
        return api.spec

    # What LitServer calls

    def register_endpoints(self) -> None:
        """Our pages only."""
        add_endpoints(self.app, self.service, self.spec.routes, self.routes)

    def verify_worker_status(self) -> None:
        """Do not wait for the worker: until it is ready, clients are told so."""

    def _start_server(
        self,
        port: int,
        num_uvicorn_servers: int,
        log_level: str,
        sockets: list[socket.socket],
        uvicorn_worker_type: str,
        **kwargs: Any,
    ) -> dict[int, ForkProcess]:
        settings = self.service.settings
        fit = make_room_for_connections(-(-settings.max_connections // num_uvicorn_servers))
        if fit * num_uvicorn_servers < settings.max_connections:
            logger.warning(
                "File descriptors are for %d connections of max_connections %d only; "
                "raise the limit (ulimit -n)",
                fit * num_uvicorn_servers,
                settings.max_connections,
            )
        limits = ConnectionLimits(
            connections=fit,
            head_bytes=settings.max_header_bytes,
            patience_s=settings.client_timeout_s,
        )

        def start(number: int) -> ForkProcess:
            app: FastAPI = copy(self.app)
            app.response_queue_id = number  # type: ignore[attr-defined]  # LitServe's way
            config = uvicorn.Config(
                app,
                port=port,
                log_level=log_level,
                http=partial(Connection, limits=limits, count=self.service.refused),  # type: ignore[arg-type]
                ws="none",
                proxy_headers=False,  # nobody's word is taken for who the client is
                timeout_keep_alive=max(1, round(settings.client_timeout_s)),
                # Its requests have ended when the main process sends SIGTERM. Systemd sends it to
                # all at once: then they have the same bound.
                timeout_graceful_shutdown=int(self.service.settings.drain_s + CLOSE_CONNECTIONS_S),
                **kwargs,
            )
            child = multiprocessing.get_context("fork").Process(
                target=HttpServer(config, settings.http_niceness).run,
                args=(sockets,),
                name=f"http-{number}",
            )
            self.service.load.beat(number)  # silent from here on: a start that hangs is ended too
            child.start()
            assert child.pid is not None
            self.service.load.set_pid(number, child.pid)
            return child

        self.start_http = start
        return {number: start(number) for number in range(num_uvicorn_servers)}

    def _start_worker_monitoring(
        self, manager: Any, uvicorn_workers: dict[int, ForkProcess]
    ) -> None:
        self.queues = manager._process
        self.service.load.set_queues_pid(manager._process.pid)
        assert self.supervise is not None
        self.supervise(uvicorn_workers)
        self._shutdown_event.set()

    def _perform_graceful_shutdown(
        self,
        manager: Any,
        uvicorn_workers: dict[int, ForkProcess],
        shutdown_reason: str = "normal",
    ) -> None:
        """Ask all HTTP processes to end at once; LitServe asks one after the other, and waits."""
        for child in uvicorn_workers.values():
            if child.is_alive():
                child.terminate()
        super()._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Life of one HTTP process."""
        number = int(app.response_queue_id)  # type: ignore[attr-defined]
        service = self.service
        count_as(f"http-{number}")
        service.open(number)
        self.spec.attach(self.response_buffer)
        dispatcher, loop = self.spec.dispatcher, asyncio.get_running_loop()
        assert dispatcher is not None
        watch_threads(lambda name: _tell(loop, dispatcher.give_up, name))
        await dispatcher.start(number, self._get_request_queue(self.spec.api_path))
        ending = asyncio.Event()
        receiving = watched(self._receive(number, ending), "responses", dispatcher.give_up)
        following = watched(service.follow_registry(), "registry", dispatcher.give_up)
        keys = watched(service.follow_keys(), "keys", dispatcher.give_up)
        chores = watched(self._do_chores(number), "chores", dispatcher.give_up)
        try:
            yield
        finally:
            following.cancel()
            keys.cancel()
            chores.cancel()
            await dispatcher.stop()
            ending.set()
            receiving.cancel()
            await asyncio.wait((receiving,))
            service.close()

    async def _do_chores(self, number: int) -> None:
        """Call ``chore`` for ever, whatever becomes of a single call."""
        while number == 0:
            await asyncio.sleep(CHORE_S)
            self.service.refresh()  # perhaps no request does
            try:
                await self.service.slow_work.run(self.chore, "collecting", owed=True)
            except Exception:
                logger.exception("A chore failed and is tried again")

    async def _receive(self, number: int, ending: asyncio.Event) -> None:
        """LitServe's response task, which ends at its first error; it swallows its own
        cancellation.

        Raises:
            AnswersLost: It ended unasked, and what it had taken from the queue is lost.
        """
        await response_queue_to_buffer(
            self._transport, self.response_buffer, number, self.litapi_connector
        )
        if not ending.is_set():
            raise AnswersLost("LitServe's response task ended at an error")


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], name: str) -> None:
    """From a thread; not when the loop has ended already, and the process with it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, name)
