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
        registry.close()

        def ready() -> None:
            for line in banner(service, key_file):
                say(line)

        run_service(
            service,
            admin_routes(Admin(service)),
            base=path,
            engine=engine,
            on_ready=ready,
            upkeep=lambda: None,
        )
        shutil.rmtree(settings.run_dir, ignore_errors=True)


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
