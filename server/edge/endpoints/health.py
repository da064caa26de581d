"""How the server is: the front page, health for orchestrators, metrics for Prometheus."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache

from fastapi import Request, Response

from server.edge.endpoints.middleware import Json
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas import Health
from server.edge.endpoints.schemas_tokens import Version
from server.edge.link.link import STALE_S, WHY_NOT, silence_s
from server.edge.service import Service
from server.metrics import Live, exposition

_installed_version = cache(importlib.metadata.version)


class HealthEndpoints:
    """The endpoints; one object per server.

    Args:
        version: Of this package.
    """

    def __init__(self, service: Service, version: str) -> None:
        self.service = service
        self.version = version

    async def index(self, request: Request) -> Response:
        """What this is and where to go on."""
        base = self.service.base
        return Json(
            {
                "name": "hira-server",
                "version": self.version,
                "base": base.name,
                "documentation": "/docs",
                "console": "/console",
                "models": "/v1/models",
                "health": "/health/ready",
                "metrics": "/metrics",
            }
        )

    async def live(self, request: Request) -> Response:
        """200 while this process answers at all."""
        return Json({"status": "live"})

    async def version_of(self, request: Request) -> Response:
        """The version of this server, as vLLM tells its own."""
        return Json({"version": self.version})

    async def ready(self, request: Request) -> Response:
        """200 when inference requests would be admitted now, else 503 and why."""
        status, detail = self.readiness()
        if status == "ready":
            return Json({"status": status})
        return Json({"status": status, "detail": detail}, 503, headers={"Retry-After": "1"})

    def readiness(self) -> tuple[str, str | None]:
        status = self.service.dispatcher.status
        if status != "ready":
            return status, WHY_NOT[status]
        state = self.service.dispatcher.state()
        silent_s = silence_s(state)
        if silent_s > STALE_S:
            return "worker_silent", f"The worker has not been heard for {silent_s:.0f} s."
        if state is not None and state.busy_s > self.service.settings.max_step_s:
            return "worker_stuck", f"One step has been running for {state.busy_s:.0f} s."
        return "ready", None

    async def metrics(self, request: Request) -> Response:
        """Prometheus's text format, summed over all processes."""
        live = self._live()
        body, content_type = await self.service.slow_work.run(
            lambda: exposition(live, request.headers.get("accept", "")), "metrics"
        )
        return Response(body, headers={"Content-Type": content_type})

    def _live(self) -> Live:
        service = self.service
        state = service.dispatcher.state()
        status, _ = self.readiness()
        return Live(
            {} if state is None else state.snapshot,
            processes=service.dispatcher.pids(),
            running={
                "requests": float(service.load.requests()),
                "tokens": float(service.load.tokens()),
            },
            worker_ready=status == "ready",
            replicas=service.dispatcher.replicas(),
            routed=service.dispatcher.routed(),
            keys_file_good=None
            if service.settings.keys_file is None
            else service.keys_fault is None,
            registered=len(service.names.records),
            build={
                "version": self.version,
                "base": service.base.name,
                "python": platform.python_version(),
                "torch": _installed_version("torch"),  # not imported in this process
            },
        )


def observe_routes(observe: HealthEndpoints) -> list[Endpoint]:
    """The routes of these endpoints."""
    get, tag = ("GET",), "Server"
    return [
        Endpoint("/", observe.index, get, tag, statuses=()),
        # Where clients of other inference servers look.
        Endpoint("/health", observe.ready, get, tag, Health, also=(503,), statuses=()),
        Endpoint("/health/live", observe.live, get, tag, Health, statuses=()),
        Endpoint("/health/ready", observe.ready, get, tag, Health, also=(503,), statuses=()),
        Endpoint("/ping", observe.ready, get, tag, Health, also=(503,), statuses=()),
        Endpoint("/version", observe.version_of, get, tag, Version, statuses=()),
        # Errors where there is a keys file.
        Endpoint("/metrics", observe.metrics, get, tag, str, "text/plain", statuses=(401, 403)),
    ]
