"""A cluster of one's own for a load test: PostgreSQL, an object store, Ray Serve.

Everything runs on this machine, on free ports, from nothing, and ends with the block: one node
that `hira cluster up` makes, or several that the same settings are deployed on. PostgreSQL
and SeaweedFS are found as the tests find them (``tests/stand``), and what is missing is said.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from loadtests.servers import ROOT, Server
from tests.stand import object_store, postgres

START_S = 600.0  # Ray, the controller, the proxy and every replica load their libraries anew
ENGINE = "ray::ServeReplica:hira:engine"
HTTP = "ray::ServeReplica:hira:http"
PROXY = "haproxy"
PROXY_KEEPER = "ray::HAProxyManager"  # which starts it
NODE = "raylet"
# What docs/cluster.md has set on every node.
SWITCHES = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.cluster.request_ids:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",
    "RAY_worker_niceness": "0",
}
HTTP_CPUS = 2.0  # of a node, where there are several


@dataclass(frozen=True)
class ClusterServer(Server):
    """A running cluster.

    Args:
        database: Its registry.
        objects: Its object store; None where its adapters are in a folder.
    """

    database: postgres.Postgres
    objects: object_store.ObjectStore | None

    def actors(self, kind: str) -> list[psutil.Process]:
        """Its processes of one kind, by title or program: ``ENGINE``, ``HTTP``, ``PROXY``,
        ``PROXY_KEEPER`` or ``NODE``, oldest first."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(one.cmdline()).startswith(kind) or one.name() == kind:
                    found.append(one)
            except psutil.Error:
                continue
        return sorted(found, key=lambda one: one.create_time())

    def wait_until_ready(self) -> None:
        """Return when every engine replica has spoken; SystemExit when that does not happen."""
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            status = self.process.poll()
            if status is not None:
                raise SystemExit(f"the cluster ended with status {status} (see {self.log})")
            if self.is_ready():
                return
            time.sleep(0.5)
        raise SystemExit(f"the cluster was not ready after {START_S} s (see {self.log})")

    def is_ready(self) -> bool:
        """Whether requests are admitted."""
        try:
            return httpx2.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of the engine and the HTTP replicas, the oldest first."""
        found = {}
        for role, kind in (("engine", ENGINE), ("http", HTTP), ("proxy", PROXY)):
            for number, one in enumerate(self.actors(kind)):
                found[f"{role}-{number}"] = one.memory_info().rss
        return found


@contextmanager
def running_cluster(
    folder: Path,
    *arguments: str,
    replicas: int,
    http_replicas: int = 1,
    with_objects: bool = False,
    dtype: str = "fp32",
    node_cpus: Sequence[int] = (),
) -> Iterator[ClusterServer]:
    """A cluster that admits requests; killed after the block unless it was stopped in it.

    Args:
        folder: For its state and its log.
        arguments: More arguments of `hira cluster up`.
        replicas, http_replicas: How large it is.
        with_objects: Whether its adapters are in an object store, and in a folder otherwise.
        dtype: Its compute dtype.
        node_cpus: Of each node of a Ray that is started first, the head's first; none: the cluster
            starts a Ray of one node itself. An engine replica takes one, an HTTP replica
            ``HTTP_CPUS``.

    Raises:
        SystemExit: PostgreSQL, the object store or Ray is missing, or it does not start.
    """
    missing = postgres.why_not() or (object_store.why_not() if with_objects else None)
    if missing is not None:
        raise SystemExit(missing)
    with ExitStack() as stack:
        database = stack.enter_context(postgres.postgres())
        objects = stack.enter_context(object_store.object_store()) if with_objects else None
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_DEDUP_LOGS": "0"}
        own = [f"--registry-url={database.url}"]
        if objects is not None:
            environment |= objects.environment
            own += ["--store-url=s3://adapters/hira", f"--store-endpoint={objects.endpoint}"]
        port = _free_port()
        own += [f"--replicas={replicas}", f"--http-replicas={http_replicas}", "--host=127.0.0.1"]
        own += [f"--port={port}", "--threads=1", f"--dtype={dtype}"]
        own += [f"--data-dir={folder / 'data'}", *arguments]
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "server.cli", "cluster", "up", *own]
        if node_cpus:
            environment = {**SWITCHES, **environment}
            command = _on_nodes(folder / "cluster.json", own, node_cpus, environment)
        log = folder / "cluster.log"
        with log.open("ab") as output:
            child = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        url = f"http://127.0.0.1:{port}"
        server = ClusterServer(url, folder / "data", log, child, database, objects)
        try:
            server.wait_until_ready()
            yield server
        finally:
            _end(child)


def _on_nodes(
    file: Path, arguments: Sequence[str], node_cpus: Sequence[int], environment: dict[str, str]
) -> list[str]:
    """The command that deploys a cluster on several nodes; its file is written."""
    command = [sys.executable, "-m", "server.cli", "cluster", "config", *arguments]
    done = subprocess.run(
        [*command, "--gpus=0"], env=environment, stdout=subprocess.PIPE, check=True
    )
    config = json.loads(done.stdout)
    config["proxy_location"] = "HeadOnly"  # the nodes of one machine have the same ports
    config["applications"][0]["args"]["cluster"]["http_cpus"] = HTTP_CPUS
    file.write_text(json.dumps(config))
    return [sys.executable, "-m", "loadtests.ray_nodes", str(file), *map(str, node_cpus)]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End it and all that it started: Ray's processes outlive one that was killed."""
    started = []
    if child.poll() is None:
        started = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        try:
            child.wait(90)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for one in started:
        try:
            one.kill()
        except psutil.Error:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
