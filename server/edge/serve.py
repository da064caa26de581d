"""Puts the server together in the main process and runs it until it is told to stop."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from adapters.errors import AdapterError
from adapters.registry import Registry
from adapters.sources import Sources
from adapters.store import Store
from server import metrics
from server.edge import logs
from server.edge.admin import Admin, admin_routes
from server.edge.api import ENGINE, HiraAPI
from server.edge.app import HiraServer
from server.edge.keys import admin_key
from server.edge.lifeline import bind_forked_children
from server.edge.loop import EngineLoop
from server.edge.native import Native
from server.edge.observe import Observe, observe_routes
from server.edge.openai import OpenAI
from server.edge.service import Base, Service
from server.edge.spec import HiraSpec
from server.edge.supervise import StartFailed, Supervisor
from server.settings import AdapterSource, Settings

LOCK_FILE: Final = "server.lock"
BACKLOG: Final = 2048
KEEP_ALIVE_S: Final = 30


def serve(
    settings: Settings,
    *,
    reload: Callable[[], Settings],
    say: Callable[[str], None],
    load_base: Callable[[Settings, str], Base] | None = None,
    engine: str = ENGINE,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        settings: All of them.
        reload: Reads them again, for SIGHUP.
        say: Shows a line to whoever started the server.
        load_base: Reads what the HTTP side needs of a base.
        engine: ``module:attribute`` of what builds the engine in the worker.

    Raises:
        StartFailed: One line that says why the server cannot run.
    """
    with _exclusive(settings.data_dir):
        _check_port(settings.host, settings.port)
        shutil.rmtree(settings.run_dir, ignore_errors=True)
        settings.run_dir.mkdir(mode=0o700)
        metrics.prepare(settings.metrics_dir)
        logs.configure(settings.log_level, access=settings.access_log)
        path, adapters = _chosen(settings)
        base = (load_base or _load_base)(settings, path)
        key, key_file = admin_key(settings.admin_key, settings.data_dir)
        del key
        registry = Registry(settings.database, Store(settings.store_dir, settings.store_bytes))
        service = Service(settings, base, registry, reload)
        _register(service, adapters)
        server = _put_together(service, path, engine)

        def ready() -> None:
            for line in banner(service, key_file):
                say(line)

        supervisor = Supervisor(
            server,
            on_ready=ready,
            on_reload=lambda: say("The settings are being reloaded."),
            upkeep=lambda: None,
        )
        supervisor.install()
        bind_forked_children()
        server.supervise = supervisor.run
        registry.close()
        server.run(
            host=settings.host,
            port=settings.port,
            num_api_servers=settings.api_processes,
            log_level="warning",
            generate_client_file=False,
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def _put_together(service: Service, path: str, engine: str) -> HiraServer:
    settings = service.settings
    version = importlib.metadata.version("hira-server")
    spec = HiraSpec(Native(service), OpenAI(service), service.dispatcher)
    api = HiraAPI(
        settings.engine_options(path),
        settings.run_dir,
        spec=spec,
        loop=EngineLoop(settings.api_processes),
        engine=engine,
        log_level=settings.log_level,
    )
    routes = [*observe_routes(Observe(service, version)), *admin_routes(Admin(service))]
    return HiraServer(api, service, routes, version)


def banner(service: Service, key_file: Path | None) -> Iterator[str]:
    """What a person sees when the server is ready."""
    settings, base = service.settings, service.base
    records, total = service.registry.list(offset=0, limit=8)
    names = ", ".join(record.name for record in records)
    more = f", and {total - len(records)} more" if total > len(records) else ""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    url = f"http://{host}:{settings.port}"
    double = ", double quantization" if settings.double_quant else ""
    stored = {"none": "not quantized", "int8": "8 bit"}.get(
        settings.quantization, f"4 bit {settings.quantization.upper()}{double}"
    )
    yield f"hira-server {importlib.metadata.version('hira-server')} is ready at {url}"
    yield f"  base       {base.name} ({stored})"
    yield f"  adapters   {total}: {names}{more}" if total else "  adapters   none yet"
    yield f"  admin key  {key_file or 'as set by HIRA_ADMIN_KEY or hira.toml'}"
    yield f"  try        {url}/docs"


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One server per data folder: two would clear each other's running state."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartFailed(f"data_dir {folder} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartFailed(
                f"data_dir {folder} is in use by another server; choose another with --data-dir"
            ) from None
        yield
    finally:
        os.close(handle)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(
                f"port {port} on {host} cannot be used: {error.strerror}; choose another with --port"
            ) from None


def _chosen(settings: Settings) -> tuple[str, tuple[AdapterSource, ...]]:
    """The base to serve and the adapters to register: without a base, the embedded demo."""
    if settings.base is not None:
        return settings.base, settings.adapters
    from server import demo

    if not (demo.BASE_DIR / "config.json").exists():
        raise StartFailed("this installation has no embedded demo; name a base with --base")
    taken = {one.name for one in settings.adapters}
    folders = sorted(demo.ADAPTERS_DIR.glob("*/adapter_config.json"))
    own = (AdapterSource(one.parent.name, str(one.parent)) for one in folders)
    return str(demo.BASE_DIR), (
        *(one for one in own if one.name not in taken),
        *settings.adapters,
    )
