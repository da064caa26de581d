"""A server of one's own for the time of a load test: started, waited for, measured, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
RESIDENT = "hira_process_resident_bytes"


@dataclass(frozen=True)
class Server:
    """A running `hira serve`."""

    url: str
    data_dir: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def admin(self) -> dict[str, str]:
        """Headers with the admin key that the server made for itself."""
        key = (self.data_dir / "admin.key").read_text(encoding="ascii").strip()
        return {"Authorization": f"Bearer {key}"}

    def wait_until_ready(self) -> None:
        """Return as soon as requests are admitted; SystemExit when that does not happen."""
        limit = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < limit:
            status = self.process.poll()
            if status is not None:
                raise SystemExit(f"the server ended with status {status} while starting")
            try:
                if httpx2.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx2.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
        raise SystemExit(f"the server was not ready after {START_TIMEOUT_S} s")

    def stop(self) -> int:
        """End it as an operator would; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def worker_pid(self) -> int | None:
        """The inference worker's, as it says itself; None while there is none."""
        try:
            return int(json.loads((self.data_dir / "run" / "worker-0.json").read_text())["pid"])
        except (FileNotFoundError, ValueError):
            return None

    def roles(self) -> dict[str, int]:
        """Process ids by role: main, the queues of LitServe, http-N and the worker."""
        main, worker = psutil.Process(self.process.pid), self.worker_pid()
        found = {"main": main.pid}
        if worker is not None:
            found["worker-0"] = worker
        # Forked from the main process, so they share its command line; the queues' comes first.
        forked = [
            one
            for one in main.children()
            if one.pid != worker and one.status() != psutil.STATUS_ZOMBIE
            if one.cmdline() == main.cmdline()
        ]
        forked.sort(key=lambda one: one.create_time())
        for number, one in enumerate(forked):
            found["queues" if number == 0 else f"http-{number - 1}"] = one.pid
        return found

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory by role, as its own metrics tell it."""
        found: dict[str, int] = {}
        for line in httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line.startswith(f'{RESIDENT}{{role="'):
                found[line.split('"')[1]] = int(float(line.rsplit(" ", 1)[1]))
        return found

    def open_files(self) -> dict[int, int]:
        """How many descriptors each of its processes holds, by process id."""
        main = psutil.Process(self.process.pid)
        return {one.pid: one.num_fds() for one in (main, *main.children(recursive=True))}


def start_server(
    data_dir: Path, dtype: str, results: Path, *arguments: str, port: int | None = None
) -> Server:
    """Start `hira serve`; it is not ready yet.

    Args:
        data_dir: Of the server.
        dtype: Its compute dtype.
        results: Folder for its log, which goes on where one is there.
        arguments: More arguments of `hira serve`.
        port: That it listens on; a free one without.
    """
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    command = [
        *(sys.executable, "-m", "server.cli", "serve"),
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={dtype}",
        f"--data-dir={data_dir}",
        *arguments,
    ]
    results.mkdir(parents=True, exist_ok=True)
    log = results / "server.log"
    with log.open("ab") as output:
        # This folder's server, also where another one is installed.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    return Server(f"http://127.0.0.1:{port}", data_dir, log, process)


@contextmanager
def ready_server(data_dir: Path, dtype: str, results: Path, *arguments: str) -> Iterator[Server]:
    """A server that admits requests; killed after the block unless it was stopped in it."""
    server = start_server(data_dir, dtype, results, *arguments)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def memory_lines(
    before: dict[str, int], after: dict[str, int], peak: dict[str, int] | None = None
) -> list[str]:
    """A table of resident memory by role, in MiB."""
    heading = f"{'resident MiB':<14}{'before':>9}{'after':>9}{'growth':>9}"
    lines = [heading + (f"{'peak':>9}" if peak else "")]
    for role in sorted(before.keys() | after.keys()):
        first, last = before.get(role, 0), after.get(role, 0)
        line = f"{role:<14}{first / 2**20:>9.1f}{last / 2**20:>9.1f}{(last - first) / 2**20:>+9.1f}"
        lines.append(line + (f"{peak.get(role, 0) / 2**20:>9.1f}" if peak else ""))
    return lines


def memory_faults(before: dict[str, int], after: dict[str, int], allowed: int) -> list[str]:
    """One line for each process that is gone, new, or grew by more than ``allowed`` bytes."""
    if before.keys() != after.keys():
        return [f"processes {sorted(after)} in place of {sorted(before)}"]
    return [
        f"{role} grew by {(after[role] - first) / 2**20:.1f} MiB "
        f"(allowed {allowed / 2**20:.0f} MiB)"
        for role, first in before.items()
        if after[role] - first > allowed
    ]
