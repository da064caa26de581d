"""Starts real servers in their real processes on free ports, and sees that nothing is left of them.

Used by the tests that are marked ``http``. Most of these servers are forked from a process that has
their modules (`tests.stand.forked_servers`); with ``anew=True`` new interpreters run them, as where
people start them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2
import psutil
import pytest

from tests.stand.forked_servers import RAY_WORKERS, ForkedServer, loaded
from tests.stand.waits import until

ROOT = Path(__file__).parents[2]
# A start is over when the server is ready or has ended; this only says when a test gives up, and
# holds on a machine with many times the work that it can do.
START_S = 280.0
END_S = 120.0  # likewise, for its end


# The same tests, of a cluster in place of one machine: how many engine replicas, or nothing.
ON_CLUSTER: Final = os.environ.get("TESTS_ON_CLUSTER", "")
CLUSTER_START_S: Final = 900.0  # Ray, the proxy and every replica load their libraries anew


def of_one_machine(why: str) -> pytest.MarkDecorator:
    """Marks what a cluster does otherwise, or not at all: skipped there, with the reason."""
    return pytest.mark.skipif(bool(ON_CLUSTER), reason=f"about one machine: {why}")


def http_processes(many: int) -> int:
    """How many HTTP processes a server has that asks for ``many``: what they promise each other
    is about one machine, and a cluster has one HTTP replica."""
    return 1 if ON_CLUSTER else many


@dataclass
class Live:
    """A running server."""

    url: str
    folder: Path  # of the server's data
    child: subprocess.Popen[bytes] | ForkedServer
    log: Path
    client: httpx2.Client
    start_s: float = START_S
    family: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def admin(self) -> dict[str, str]:
        """Headers with the admin key that the server generated."""
        key = (self.folder / "admin.key").read_text(encoding="ascii").strip()
        return {"Authorization": f"Bearer {key}"}

    @property
    def worker_pid(self) -> int:
        import json

        state = json.loads((self.folder / "run" / "worker-0.json").read_text())
        return int(state["pid"])

    def engine_pids(self) -> list[int]:
        """Of the worker; of a cluster, of its engine replicas."""
        if not ON_CLUSTER:
            return [self.worker_pid]
        found = []
        for one in self.processes():
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or is not buried yet
                if "hira:engine" in "".join(one.cmdline()):
                    found.append(one.pid)
        return found

    def kill_engine(self) -> None:
        """Kill the worker; of a cluster, one of its engine replicas, as soon as there is one."""
        until(self.engine_pids, "no engine replica is there", within_s=self.start_s)
        os.kill(self.engine_pids()[0], signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """The main process and all below it; every one that was ever seen is remembered."""
        main = psutil.Process(self.child.pid)
        found = [main, *main.children(recursive=True)]
        self.family.update({one.pid: one for one in found})
        return found

    def left_over(self) -> list[psutil.Process]:
        """Processes of this server that still run."""
        found = []
        for one in self.family.values():
            with suppress(psutil.NoSuchProcess):
                if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def wait_ready(self, within_s: float | None = None) -> float:
        """Wait until it admits requests; returns how long that took."""
        within_s = self.start_s if within_s is None else within_s
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            if self.child.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return time.monotonic() - began
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready in {within_s} s: {self.log.read_text()}")

    def metric(self, line: str) -> float:
        """The value of one sample, 0 where it is not there yet."""
        for one in self.client.get("/metrics").text.splitlines():
            if one.startswith(line + " "):
                return float(one.rsplit(" ", 1)[1])
        return 0.0

    def end(self, number: int = signal.SIGTERM, within_s: float = END_S) -> int:
        """Send a signal and wait for the exit status."""
        self.processes()
        self.child.send_signal(number)
        return self.child.wait(within_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """This process's, without what would be taken for settings, and with those given."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HIRA_", "PROMETHEUS_", "PYTEST_"))
    }
    given = {f"HIRA_{name.upper()}": str(value) for name, value in settings.items()}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
        "HIRA_DATA_DIR": str(folder),
        **given,
    }


def interpreter(
    command: Sequence[str], environment: dict[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """A new one, in a session of its own; ``command`` are its arguments after ``python``."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def running(
    folder: Path,
    command: Sequence[str],
    *,
    wait: bool = True,
    anew: bool = True,
    **settings: object,
) -> Iterator[Live]:
    """A server as a child process; killed with all that belongs to it at the end.

    Args:
        folder: For its data and its log.
        command: Arguments after ``python``; where the server is not run anew, ``-m``, a module with
            a function ``main``, and arguments.
        wait: Until it is ready.
        anew: Whether in a new interpreter.
        settings: As environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = folder.parent / f"{folder.name}.log"
    given = environment(folder, **{"port": port, "log_level": "info", **settings})
    child: subprocess.Popen[bytes] | ForkedServer
    if anew:
        child = interpreter(command, given, folder.parent, log)
    else:
        log.unlink(missing_ok=True)
        common = {name: one for name, one in given.items() if not name.startswith("HIRA_")}
        given[RAY_WORKERS] = "1" if ON_CLUSTER else ""
        process = loaded(tuple(sorted(common.items())))
        _, module, *arguments = command
        child = process.start(module, arguments, environment=given, folder=folder.parent, log=log)
    url = f"http://127.0.0.1:{port}"
    live = Live(url, folder, child, log, httpx2.Client(base_url=url, timeout=60))
    try:
        if wait:
            live.wait_ready()
        live.processes()
        yield live
    finally:
        live.client.close()
        if child.poll() is None:
            live.processes()
        child.kill()
        child.wait()
        for one in live.left_over():
            with suppress(psutil.NoSuchProcess):
                one.kill()
        state = folder / "run"
        if state.is_symlink():  # in memory: what a killed server leaves there stays
            shutil.rmtree(state.readlink(), ignore_errors=True)


def hira(
    folder: Path, *arguments: str, wait: bool = True, anew: bool = False, **settings: object
) -> AbstractContextManager[Live]:
    """`hira serve` itself; with one thread where it is not run anew, and then others run too.

    Where ``TESTS_ON_CLUSTER`` is set, to a number of engine replicas, it is `hira cluster up`.
    """
    if ON_CLUSTER:
        own = ["server.cli.main", "cluster", "up", "--replicas", ON_CLUSTER]
        return _cluster(folder, [*own, *arguments], wait, settings)
    if not anew:
        settings = {"threads": 1, **settings}
    script = ["-c", "from server.cli.main import main; main()"]
    command = [*(script if anew else ["-m", "server.cli.main"]), "serve", *arguments]
    return running(folder, command, wait=wait, anew=anew, **settings)


@contextmanager
def _cluster(
    folder: Path, command: Sequence[str], wait: bool, settings: Mapping[str, object]
) -> Iterator[Live]:
    """A cluster by a module with a function ``main`` and its arguments."""
    given: dict[str, Any] = {"threads": 1, **settings}
    with running(folder, ["-m", *command], wait=False, anew=False, **given) as live:
        live.start_s = CLUSTER_START_S
        if wait:
            live.wait_ready()
        yield live


def fake(
    folder: Path,
    engine: str = "tests.stand.fake_engine:build",
    *,
    wait: bool = True,
    anew: bool = False,
    **settings: object,
) -> AbstractContextManager[Live]:
    """The server around the fake engine."""
    if ON_CLUSTER:
        return _cluster(folder, ["tests.stand.fake_cluster", engine, ON_CLUSTER], wait, settings)
    command = ["-m", "tests.stand.fake_server", engine]
    return running(folder, command, wait=wait, anew=anew, **settings)
