"""One replica of the HTTP surface: the same endpoints as on one machine, over another link."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from adapters.registry.adapter_bytes import open_store
from adapters.registry.registry import Registry
from server.cluster.cluster_link import ClusterLink
from server.cluster.drain import follow_phase
from server.cluster.metric_files import count_on_node
from server.cluster.request_ids import OneRequestId
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.edge.endpoints.admin import admin_routes
from server.edge.endpoints.application import add_endpoints, describe_app
from server.edge.endpoints.cross_origin import cors_options
from server.edge.endpoints.health import HealthEndpoints, observe_routes
from server.edge.endpoints.inference import inference_routes
from server.edge.endpoints.key_report import KeyReport, key_routes
from server.edge.endpoints.middleware import RequestMiddleware
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.pages import page_routes
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.tei_tgi import TeiTgi
from server.edge.link.link import Link
from server.edge.link.thread_deaths import watched
from server.edge.processes.serve import Collector
from server.edge.processes.start import describe_base
from server.edge.service import Service
from server.settings import Settings
from server.version import package_version

logger = logging.getLogger(__name__)

COLLECTOR_LOOKS_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class IngressPlan:
    """What a replica of the HTTP surface is made of.

    Args:
        settings: Of the cluster.
        place: Folder or hub id of the base.
        base_name: As ``/v1`` shows it.
        engines: Name of the engines' deployment.
    """

    settings: Settings
    place: str
    base_name: str
    engines: str


class Ingress:
    """See the module. A Ray Serve deployment makes it.

    Args:
        plan: What it is made of.
        engines: Handle to the engine replicas.
        name: Of this replica.
    """

    def __init__(self, plan: IngressPlan, engines: Any, name: str) -> None:
        settings = plan.settings
        self.counted_as = count_on_node("http", settings.metrics_dir)
        link = partial(ClusterLink, engines=engines, deployment=plan.engines, name=name)
        self.service = self.make_service(plan, link)

    def make_service(
        self, plan: IngressPlan, link: Callable[[SharedLoad, Bounds], Link]
    ) -> Service:
        """What the endpoints use, over ``link``."""
        settings = plan.settings
        base = describe_base(settings, plan.place, plan.base_name)
        store_bytes = None if settings.store_bytes is None else int(settings.store_bytes)
        registry = Registry(
            settings.database,
            open_store(settings.store_dir, settings.remote_store, store_bytes),
            kept_versions=settings.kept_versions,
            grace_s=settings.grace_s,
        )
        # As of the counts: a replica that comes after one that died goes on with its quotas.
        usage_file = f"key-usage-{self.counted_as}.json"
        return Service(settings, base, registry, lambda: settings, link, usage_file=usage_file)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app, which Ray Serve asks for when the replica is made."""
        return build_app(self.service, self.counted_as)


def build_app(service: Service, name: str) -> FastAPI:
    """The same app as LitServe runs on one machine.

    Args:
        service: What its endpoints use.
        name: Of this replica, among those of this machine.
    """
    version = package_version()
    cors = cors_options(service.settings)
    app = FastAPI(
        lifespan=partial(_life, service, name),
        middleware=[
            *([] if cors is None else [Middleware(CORSMiddleware, **cors)]),
            Middleware(OneRequestId),
            Middleware(RequestMiddleware, service=service),
        ],
    )
    describe_app(app, version)
    inference = inference_routes(TeiTgi(service), Ranking(service), OpenAI(service))
    health = observe_routes(HealthEndpoints(service, version))
    admin = [*admin_routes(service), *key_routes(KeyReport(service))]
    others = [*health, *admin, *page_routes()]
    add_endpoints(app, service, inference, others)
    return app


@asynccontextmanager
async def _life(service: Service, name: str, app: FastAPI) -> AsyncIterator[None]:
    service.open(0)
    link = service.dispatcher
    assert isinstance(link, ClusterLink)
    link.end = lambda: os.kill(os.getpid(), signal.SIGKILL)  # Ray Serve starts another
    await link.start()
    tasks = [
        watched(service.follow_registry(), "registry", link.give_up),
        watched(service.follow_keys(), "keys", link.give_up),
        watched(_do_chores(service), "chores", link.give_up),
        watched(follow_phase(service.settings.run_dir, name, service.load), "phase", link.give_up),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await link.stop()
        service.keep_usage()  # what was counted since the last writing
        service.close()


async def _do_chores(service: Service) -> None:
    """Collect, now and then, what nobody names any more, whatever becomes of a single try."""
    collector = Collector(service)
    while True:
        await asyncio.sleep(COLLECTOR_LOOKS_S)
        try:
            await service.slow_work.run(collector.look, "collecting", owed=True)
        except Exception:
            logger.exception("A chore failed and is tried again")
