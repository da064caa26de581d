"""The Ray Serve application: engine replicas, HTTP replicas, and what joins them.

A config file for ``serve deploy`` names ``build_application``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from ray import serve
from ray.serve._private import constants as serve_constants
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from adapters.registry.faults import RegistryUnusable, database_faults
from adapters.registry.registry import Registry
from server.cluster.ingress import Ingress, IngressPlan
from server.cluster.replica import EngineReplica, ReplicaPlan
from server.cluster.router import AffinityRouter
from server.cluster.routing import SPILL_FACTOR, SPILL_REQUESTS, SpillPolicy
from server.edge.link.engine_like import ENGINE
from server.edge.litserve import logs
from server.edge.processes import start as prepare
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.preflight import check_callers
from server.metrics import FOLDER_VARIABLE
from server.settings import SettingFault, Settings, SettingsFault, load_settings

APPLICATION: Final = "hira"
ENGINES: Final = "engine"
HTTP: Final = "http"
ROUTER_LOOP: Final = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"
# Bounds of Ray Serve on what one replica is asked at once: our own admission comes first.
ONGOING_MAX: Final = 100_000
ROUTING_STATS_S: Final = 0.5
HEALTH_EVERY_S: Final = 2.0
DRAIN_SPARE_S: Final = 5.0  # beyond drain_s, until Ray Serve kills a replica that does not end


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """How large a cluster is, and how it routes.

    Args:
        replicas: Of the engine, each with the base on a device of its own.
        max_replicas: With more than ``replicas``, as many as traffic needs.
        target_requests: Requests a replica that are aimed at when their number follows traffic.
        http_replicas: Of the HTTP surface.
        cpus: Of a node, for an engine replica.
        gpus: The same; 0 on nodes without.
        http_cpus: Of a node, for an HTTP replica.
        spill_requests, spill_factor: See ``SpillPolicy``.
        engine: ``module:attribute`` of what builds the engine.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_requests: float = 32.0
    http_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    http_cpus: float = 1.0
    spill_requests: int = SPILL_REQUESTS
    spill_factor: float = SPILL_FACTOR
    engine: str = ENGINE


def build_application(args: Mapping[str, Any]) -> serve.Application:
    """The application.

    The adapters that the settings name are registered now; who starts later, replicas that come
    with traffic among them, finds the registry as it is then.

    Args:
        args: ``settings``: as `load_settings` takes flags; ``cluster``: the fields of
            ``ClusterOptions``.

    Raises:
        SettingsFault: Something in them cannot be used.
        StartFailed: The base or an adapter cannot be served.
    """
    known = {one.name for one in fields(ClusterOptions)}
    unknown = sorted(set(args.get("cluster", {})) - known)
    if unknown or set(args) - {"settings", "cluster"}:
        raise SettingsFault(
            SettingFault(
                "the arguments of the application have no such option",
                found=", ".join(unknown) or ", ".join(sorted(args)),
                expected="settings; cluster, with any of " + ", ".join(sorted(known)),
            )
        )
    options = ClusterOptions(**args.get("cluster", {}))
    settings = load_settings(args.get("settings", {}))
    return application_of(settings, options)


def open_registry(settings: Settings, *, check: bool = False) -> Registry:
    """The registry of a cluster.

    Args:
        check: Repair what a crash left; only while nothing else uses the store.

    Raises:
        StartFailed: It cannot be used; the line says why.
    """
    try:
        store = prepare.open_adapter_store(settings)
        with database_faults(settings.database):
            registry = Registry(
                settings.database,
                store,
                kept_versions=settings.kept_versions,
                grace_s=settings.grace_s,
            )
            if check:
                registry.check()
    except RegistryUnusable as error:
        raise StartFailed(str(error)) from None
    return registry


def application_of(settings: Settings, options: ClusterOptions) -> serve.Application:
    """The application of settings that were read."""
    check_callers(settings)
    place, name, adapters = prepare.base_and_adapters(settings)
    base = prepare.describe_base(settings, place, name)
    registry = open_registry(settings)
    prepare.register(registry, base, adapters, settings)
    prepare.check_base(registry, base)
    prepare.check_default(registry, settings)
    registry.close()
    registry.store.close()
    digest = base.signature.digest
    return deployed(settings, options, place=place, base_name=name, base_digest=digest)


def deployed(
    settings: Settings,
    options: ClusterOptions,
    *,
    place: str,
    base_name: str,
    base_digest: str,
    http: type[Ingress] | None = None,
) -> serve.Application:
    """The deployments, joined; nothing is read or registered.

    Args:
        settings: Of the cluster.
        options: How large it is.
        place: Folder or hub id of the base.
        base_name: As ``/v1`` shows it.
        base_digest: Of the base, as the registry has it.
        http: What an HTTP replica is, if not ``HttpDeployment``.
    """
    environment = {FOLDER_VARIABLE: str(settings.metrics_dir), "TOKENIZERS_PARALLELISM": "false"}
    kept = {name: os.environ[name] for name in ("OMP_WAIT_POLICY",) if name in os.environ}
    # A line for each call would cost more than many a call, and the HTTP replicas have one.
    quiet = LoggingConfig(enable_access_log=False, log_level=settings.log_level.upper())
    plan = ReplicaPlan(
        engine=options.engine,
        options=settings.engine_options(place),
        database=settings.database,
        base_digest=base_digest,
        max_step_s=settings.max_step_s,
        metrics_dir=settings.metrics_dir,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    both: dict[str, Any] = {
        "max_ongoing_requests": ONGOING_MAX,
        "graceful_shutdown_timeout_s": settings.drain_s + DRAIN_SPARE_S,
        "health_check_period_s": HEALTH_EVERY_S,
        "health_check_timeout_s": settings.hang_s,
        "logging_config": quiet,
    }
    engines = serve.deployment(
        _EngineDeployment,
        name=ENGINES,
        ray_actor_options={
            "num_cpus": options.cpus,
            "num_gpus": options.gpus,
            "runtime_env": {"env_vars": {**environment, **kept}},
        },
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs=asdict(SpillPolicy(options.spill_requests, options.spill_factor)),
            request_routing_stats_period_s=ROUTING_STATS_S,
            request_routing_stats_timeout_s=settings.hang_s,
        ),
        **_scale(options),
        **both,
    ).bind(plan)
    surface = serve.deployment(
        serve.ingress()(http or HttpDeployment),
        name=HTTP,
        num_replicas=options.http_replicas,
        ray_actor_options={
            "num_cpus": options.http_cpus,
            "runtime_env": {"env_vars": environment},
        },
        **both,
    )
    ingress = IngressPlan(settings, place, base_name, ENGINES)
    return surface.bind(ingress, engines)


def _scale(options: ClusterOptions) -> dict[str, Any]:
    if options.max_replicas is None or options.max_replicas <= options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_requests,
            upscale_delay_s=5.0,
            downscale_delay_s=60.0,
        )
    }


def _check_loop_of_router() -> None:
    """The link and the router share what they know without locks."""
    if serve_constants.RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP:
        raise StartFailed(
            "Ray Serve would route requests on an event loop of its own",
            found=f"{ROUTER_LOOP} is {os.environ.get(ROUTER_LOOP, 'not set')}",
            expected="0, on every node",
            fix=f"set {ROUTER_LOOP}=0 in the environment of every node before Ray is started there",
        )


class _EngineDeployment(EngineReplica):
    """An engine replica in a process of Ray Serve, which names it."""

    def __init__(self, plan: ReplicaPlan) -> None:
        logs.configure(plan.log_level, access=False, form=plan.log_format)
        super().__init__(plan, serve.get_replica_context().replica_id.unique_id)


class HttpDeployment(Ingress):
    """An HTTP replica in a process of Ray Serve, which names it.

    Raises:
        StartFailed: Ray Serve would route on another event loop than that of the requests.
    """

    def __init__(self, plan: IngressPlan, engines: Any) -> None:
        _check_loop_of_router()
        said = plan.settings
        logs.configure(said.log_level, access=said.access_log, form=said.log_format)
        super().__init__(plan, engines, serve.get_replica_context().replica_id.unique_id)
