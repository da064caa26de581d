"""`hira serve`: prepares everything in the main process, and runs the service until it is told to
stop."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing import util
from typing import Final

from adapters.errors import AdapterError
from adapters.registry.faults import RegistryUnusable, database_faults
from adapters.registry.registry import Registry
from server import metrics
from server.edge.admit.keys import resolve_admin_key
from server.edge.endpoints.admin import admin_routes
from server.edge.endpoints.key_report import KeyReport, key_routes
from server.edge.endpoints.pages import page_routes
from server.edge.link.engine_like import ENGINE
from server.edge.litserve import logs
from server.edge.processes import start as prepare
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.preflight import check_port, exclusive
from server.edge.processes.run import banner, run_service
from server.edge.processes.run_folder import RunFolder, run_folder
from server.edge.service import Service
from server.settings import Settings, SettingsFault
from server.stages import tell_stage

COLLECT_S: Final = 60.0
# Of the path of a socket in Linux, and of what multiprocessing puts behind its folder.
SOCKET_PATH_BYTES: Final = 107
_SOCKET_NAME: Final = "/listener-4194304-10-abcdefgh"

logger = logging.getLogger(__name__)


def serve(
    settings: Settings,
    *,
    reload: Callable[[], Settings],
    say: Callable[[str], None],
    engine: str = ENGINE,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        settings: All of them.
        reload: Reads them again, for SIGHUP.
        say: Shows a line to whoever started the server.
        engine: ``module:attribute`` of what builds the engine in the worker.

    Raises:
        StartFailed: One line that says why the server cannot run.
    """
    os.umask(0o077)  # keys, adapters and state are nobody else's to read
    with exclusive(settings.data_dir):
        check_port(settings.host, settings.port)
        check_socket_folder(util.get_temp_dir())
        staging = settings.data_dir / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        logs.configure(settings.log_level, access=settings.access_log, form=settings.log_format)
        need_bytes = metrics.most_bytes(settings.api_processes)
        with run_folder(settings.run_dir, need_bytes) as folder:
            _serve_in(folder, settings, reload=reload, say=say, engine=engine)


def _serve_in(
    folder: RunFolder,
    settings: Settings,
    *,
    reload: Callable[[], Settings],
    say: Callable[[str], None],
    engine: str,
) -> None:
    metrics.prepare(settings.metrics_dir)
    tell_stage("reading the base")
    place, name, adapters = prepare.base_and_adapters(settings)
    base = prepare.describe_base(settings, place, name)
    keyed = settings.keys_file is None or settings.admin_key is not None
    key_file = settings.keys_file
    if keyed:
        _, key_file = resolve_admin_key(settings.admin_key, settings.data_dir)
    store = prepare.open_adapter_store(settings)
    try:
        with database_faults(settings.database):
            registry = Registry(
                settings.database,
                store,
                kept_versions=settings.kept_versions,
                grace_s=grace_of(settings),
            )
            registry.check()
    except RegistryUnusable as error:
        raise StartFailed(str(error)) from None
    prepare.register(registry, base, adapters, settings)
    prepare.check_base(registry, base)
    prepare.check_default(registry, settings)
    tell_stage("starting the processes")
    try:
        service = Service(settings, base, registry, reload)
    except SettingsFault as fault:  # the keys file has changed since it was looked at
        raise StartFailed(str(fault)) from None
    registry.close()  # what is forked from here on must open its own
    store.close()
    collector = Collector(service)

    def ready() -> None:
        for line in banner(service, key_file):
            say(line)

    def upkeep() -> None:
        if folder.restore():
            settings.metrics_dir.mkdir()

    run_service(
        service,
        [*admin_routes(service), *key_routes(KeyReport(service)), *page_routes()],
        base=place,
        engine=engine,
        on_ready=ready,
        upkeep=upkeep,
        chore=collector.look,
    )
    service.keep_usage()  # what was counted since the last writing


def grace_of(settings: Settings) -> float:
    """Seconds after which no request can need the bytes of a version that a name has left."""
    return settings.grace_s


class Collector:
    """Deletes, now and then, the bytes of versions that nobody names or needs any more.

    Runs in a thread of the first HTTP process: a database that hangs holds it up, and must hold up
    neither requests nor the main process, which watches all others.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._at = time.monotonic()
        # As the main process has it: an HTTP process that starts later may know a shorter limit.
        self._grace_s = grace_of(service.settings)

    def look(self) -> None:
        """Collect, if it is time; what goes wrong is logged, and tried again the next time."""
        if time.monotonic() - self._at < COLLECT_S:
            return
        self._at = time.monotonic()
        settings = self._service.settings
        # No request lives longer than max_timeout_s, so none can still need what is older. One
        # that was admitted before the limit was lowered has the longer one still.
        self._grace_s = max(self._grace_s, grace_of(settings))
        state = self._service.dispatcher.state()
        resident = set() if state is None else set(state.snapshot.get("residency", {}))
        try:
            self._service.registry.collect_garbage(resident, grace_s=self._grace_s)
        except (AdapterError, OSError) as error:
            logger.error("Versions that nobody names were not collected: %s", error)


def check_socket_folder(folder: str) -> None:
    """Sockets between the processes lie in it; some versions of Python do not shorten its path.

    Args:
        folder: That ``multiprocessing`` made below the folder of temporary files.

    Raises:
        StartFailed: The path of a socket in it would be too long.
    """
    if len(os.fsencode(folder + _SOCKET_NAME)) > SOCKET_PATH_BYTES:
        raise StartFailed(
            f"the folder of temporary files, {os.path.dirname(folder)}, has too long a path for "
            f"the sockets in it (at most {SOCKET_PATH_BYTES} bytes with their names); set TMPDIR "
            "to a shorter one"
        )
