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
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkProcess
from reprlib import Repr
from typing import Any, Final

import uvicorn
from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litserve import LitServer
from litserve.server import response_queue_to_buffer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route

from server.edge.admit.connections import Connection, ConnectionLimits, make_room_for_connections
from server.edge.endpoints.middleware import BodyRefused, RequestMiddleware, error_response
from server.edge.endpoints.openapi import amended
from server.edge.endpoints.queries import check_query
from server.edge.endpoints.routes import Endpoint
from server.edge.link.thread_deaths import watch_threads, watched
from server.edge.litserve.api import HiraAPI
from server.edge.litserve.spec import HiraSpec
from server.edge.service import Service
from server.errors import Fault, Refusal
from server.metrics import count_as
from server.settings import Settings

logger = logging.getLogger(__name__)

TITLE: Final = "hira-server"
DESCRIPTION: Final = "Many HiRA and LoRA adapters on one 4-bit base model."
CLOSE_CONNECTIONS_S: Final = (
    2.0  # for an HTTP process whose requests have ended, to close its connections
)
CHORE_S: Final = 1.0
JOIN_S: Final = 10.0  # from SIGTERM to SIGKILL for an HTTP process
BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none"})  # of unions, in locations
CORS_METHODS: Final = ("GET", "POST", "PATCH", "DELETE", "OPTIONS")
CORS_EXPOSED: Final = (  # headers of answers that a page may read
    *("X-Request-Id", "X-Adapter", "X-Adapter-Version", "X-Queue-Ms", "X-Compute-Ms"),
    "Retry-After",
)
# What a fault shows of a value: repr() of all of a large one would take its time.
SHORT_REPR: Final = Repr()
SHORT_REPR.maxlevel = 2
SHORT_REPR.maxlist = SHORT_REPR.maxtuple = 120
SHORT_REPR.maxstring = SHORT_REPR.maxlong = SHORT_REPR.maxother = 400
_bearer_scheme = HTTPBearer(auto_error=False)


class AnswersLost(Exception):
    """Answers of the worker did not arrive: who waits for them is not known."""


class HttpServer(uvicorn.Server):
    """uvicorn in a child: ends by SIGTERM from the main process, not by Ctrl-C of the terminal."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
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
        super().__init__(
            api,
            accelerator="cpu",  # one worker: the engine chooses its device by its own options
            devices=1,
            timeout=False,  # deadlines are the dispatcher's
            restart_workers=True,
            middlewares=[(RequestMiddleware, {"service": service}), *_cors(service.settings)],
        )
        self.uvicorn_graceful_timeout = service.settings.drain_s + JOIN_S
        self.app.title, self.app.version, self.app.description = TITLE, version, DESCRIPTION
        self.app.add_exception_handler(Refusal, _on_refusal)
        self.app.add_exception_handler(RequestValidationError, _on_invalid)
        self.app.add_exception_handler(HTTPException, _on_http)

    @property
    def spec(self) -> HiraSpec:
        (api,) = self.litapi_connector
        assert isinstance(api.spec, HiraSpec)
        return api.spec

    # What LitServer calls

    def register_endpoints(self) -> None:
        """Our pages only, with what the OpenAPI document needs."""
        theirs = {"/docs", "/redoc", "/docs/oauth2-redirect"}  # they ask other machines for scripts
        self.app.router.routes[:] = [
            one for one in self.app.router.routes if getattr(one, "path", "") not in theirs
        ]
        inference = [Depends(self._admit_inference), Depends(check_query)]
        for route in self.spec.routes:
            self.app.add_api_route(
                route.path, route.endpoint, dependencies=inference, **route.options()
            )
        for route in self.routes:
            admin = [Depends(self._admit_admin), Depends(check_query)]
            guards = admin if route.tag == "Admin" else []
            self.app.add_api_route(
                route.path, route.endpoint, dependencies=guards, **route.options()
            )
        openapi = amended(self.app, [*self.spec.routes, *self.routes])
        self.app.openapi = openapi  # FastAPI's own way

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
                target=HttpServer(config).run, args=(sockets,), name=f"http-{number}"
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
        dispatcher, loop = service.dispatcher, asyncio.get_running_loop()
        watch_threads(lambda name: _tell(loop, dispatcher.give_up, name))
        await dispatcher.start(number, self._get_request_queue(self.spec.api_path))
        ending = asyncio.Event()
        receiving = watched(self._receive(number, ending), "responses", dispatcher.give_up)
        following = watched(service.follow_registry(), "registry", dispatcher.give_up)
        chores = watched(self._do_chores(number), "chores", dispatcher.give_up)
        try:
            yield
        finally:
            following.cancel()
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

    # Guards

    async def _admit_inference(
        self,
        request: Request,
        key: HTTPAuthorizationCredentials | None = Security(_bearer_scheme),  # noqa: B008
    ) -> None:
        self.service.keys.admit_inference(request.headers.get("authorization"))
        await self.service.catch_up()

    async def _admit_admin(
        self,
        request: Request,
        key: HTTPAuthorizationCredentials | None = Security(_bearer_scheme),  # noqa: B008
    ) -> None:
        self.service.keys.admit_admin(request.headers.get("authorization"))
        await self.service.catch_up()


def _cors(settings: Settings) -> list[tuple[type[CORSMiddleware], dict[str, Any]]]:
    """Outside of everything else, so that errors and streams have its headers too; none unless
    the operator names origins. Keys travel in a header, so no browser is asked for credentials.
    """
    if not settings.cors_origins:
        return []
    options = {
        "allow_origins": settings.cors_origins,
        "allow_methods": CORS_METHODS,
        "allow_headers": ("*",),
        "expose_headers": CORS_EXPOSED,
    }
    return [(CORSMiddleware, options)]


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], name: str) -> None:
    """From a thread; not when the loop has ended already, and the process with it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, name)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error_response(request.scope, error)


async def _on_http(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such page, wrong method, a body that broke a limit."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return error_response(request.scope, error.refusal)
    path = request.scope["path"]
    match error.status_code:
        case 404:
            refusal = Refusal.because(
                "not_found", "There is no such page.", found=path[:200], fix="See /docs."
            )
        case 405:
            refusal = Refusal.because(
                "method_not_allowed",
                f"{request.method} is not allowed here.",
                found=request.method,
                expected=(allowed := _allowed(request)),
                headers={"Allow": allowed},
            )
        case 400:
            refusal = Refusal.because(
                "malformed_body", "The body cannot be read.", expected="JSON in UTF-8"
            )
        case _:
            refusal = Refusal.because("internal", str(error.detail))
    return error_response(request.scope, refusal)


def _allowed(request: Request) -> str:
    """All methods of a path: Starlette names those of its first route only."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A body or a query that does not fit its schema: every fault names its field."""
    assert isinstance(error, RequestValidationError)
    by_field: dict[str | None, Fault] = {}
    for one in error.errors()[:100]:
        fault = _fault(dict(one), request)
        before = by_field.get(fault.field)
        # The branches of a union fail one by one at the same field: one fault for people.
        by_field[fault.field] = (
            fault
            if before is None
            else replace(before, message=f"{before.message}; or: {fault.message}")
        )
    return error_response(request.scope, Refusal(list(by_field.values())[:20]))


def _fault(found: Mapping[str, Any], request: Request) -> Fault:
    if found["type"] == "json_invalid":
        reason = str(found.get("ctx", {}).get("error", "not JSON"))
        at = f" at character {found['loc'][-1]}"
        return Fault("malformed_body", "The body is not JSON.", reason + at, "JSON in UTF-8")
    content_type = request.headers.get("content-type", "")
    fix = None
    if tuple(found["loc"]) == ("body",) and "json" not in content_type:
        fix = "Send the header Content-Type: application/json."
    value = found.get("input")
    shown = (
        None if isinstance(value, dict | bytes) or value is None else SHORT_REPR.repr(value)[:120]
    )
    return Fault("invalid_request", str(found["msg"]), shown, fix=fix, field=_field(found["loc"]))


def _field(location: Sequence[int | str]) -> str | None:
    """``inputs.0`` of pydantic's location: without the names of a union's branches."""
    kept: list[str] = []
    for part in location[1:]:
        if isinstance(part, str) and (not part.isidentifier() or part in BRANCHES):
            continue
        kept.append(str(part))
    return ".".join(kept) or None
