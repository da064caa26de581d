"""A real server in its own processes, and connections to it that cost little.

Clients speak HTTP/1.1 over plain sockets: a full client library would take as long as the server,
on the same cores.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from loadtests.bench.timing import THREADS

_ROOT = Path(__file__).parents[2]
_START_S = 120.0
_STOP_S = 60.0


@dataclass
class Connection:
    """One HTTP/1.1 connection that is kept alive between requests."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, body: Any) -> AsyncIterator[bytes]:
        """Send a body and yield the pieces of the answer as they arrive.

        Raises:
            SystemExit: The status is not 200.
        """
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self.writer.write(head.encode() + content)
        await self.writer.drain()
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = answer.split(" ", 2)[1]
        length = _header(answer, "content-length")
        if status != "200":
            found = await self.reader.read(2000)
            raise SystemExit(f"{path} answered {status}: {found.decode(errors='replace')}")
        if length is not None:
            yield await self.reader.readexactly(int(length))
            return
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def ask(self, path: str, body: Any) -> bytes:
        """Send a body; the whole answer."""
        return b"".join([piece async for piece in self.post(path, body)])

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):  # the server was faster
            await self.writer.wait_closed()

    def abort(self) -> None:
        """Go away at once, as a client that dies."""
        self.writer.transport.abort()


@dataclass
class Server:
    """A running `hira serve`."""

    port: int
    child: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        # Not a client library's: it is asked ten times a second while the server starts.
        asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            asked.request("GET", path)
            answer = asked.getresponse()
            return answer.status, answer.read().decode()
        finally:
            asked.close()

    def wait_ready(self) -> None:
        limit = time.monotonic() + _START_S
        while time.monotonic() < limit:
            if self.child.poll() is not None:
                break
            try:
                if self.get("/health/ready")[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(0.1)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"the server did not become ready:\n{tail}")

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that the server's processes have taken so far, by role."""
        used = dict.fromkeys(("main", "queues", "http", "worker"), 0.0)
        main = psutil.Process(self.child.pid)
        forked = []
        for one in (main, *main.children(recursive=True)):
            times = one.cpu_times()
            if one == main:
                used["main"] = times.user + times.system
            elif "spawn_main" in " ".join(one.cmdline()):
                used["worker"] = times.user + times.system
            elif one.cmdline() == main.cmdline():
                forked.append((one.create_time(), times.user + times.system))
        # The process of the queues is forked first.
        queues, *http = (seconds for _, seconds in sorted(forked))
        used["queues"], used["http"] = queues, sum(http)
        return used

    def steps(self) -> tuple[float, float, float]:
        """Steps of the encode lane so far: how many, their rows, their seconds."""
        found = dict.fromkeys(("batch_rows_count", "batch_rows_sum", "step_seconds_sum"), 0.0)
        for line in self.get("/metrics")[1].splitlines():
            name, _, value = line.rpartition(" ")
            for wanted in found:
                if name == f'hira_{wanted}{{lane="encode"}}':
                    found[wanted] = float(value)
        count, rows, seconds = found.values()
        return count, rows, seconds

    def gauges(self) -> tuple[float, float]:
        """Active sequences, waiting ones included, and used KV blocks; from /metrics."""
        values = {}
        for line in self.get("/metrics")[1].splitlines():
            name, _, value = line.rpartition(" ")
            values[name] = value
        return (
            float(values['hira_queue_depth{lane="generate"}']),
            float(values['hira_kv_blocks{state="used"}']),
        )


@contextmanager
def running(
    base: Path,
    adapters: Sequence[Path],
    dtype: str,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    more: Sequence[str] = (),
) -> Iterator[Server]:
    """`hira serve` in ``dtype`` with all adapters and ``more`` flags; ended with all its
    processes."""
    with tempfile.TemporaryDirectory(prefix="hira-bench-server-") as name:
        root = Path(name)
        port = _free_port()
        named = [f"--adapter={one.name}={one}" for one in adapters]
        command = [
            *(sys.executable, "-c", "from server.cli.main import main; main()", "serve"),
            *("--base", str(base), "--host=127.0.0.1", f"--port={port}"),
            *(f"--dtype={dtype}", f"--device={device}", f"--threads={THREADS}"),
            *("--timeout-s=600", "--max-timeout-s=600"),  # a slow machine is measured as well
            *(f"--data-dir={root / 'data'}", *named, *more),
        ]
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HIRA_", "PROMETHEUS_"))
        }
        log = root / "server.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                cwd=root,
                env={**kept, "PYTHONPATH": str(_ROOT)},
                stdout=output,
                stderr=output,
                # A group to end it by. A session of its own would give it, on a busy machine, a
                # larger share of the processor than the engine in this process has.
                process_group=0,
            )
        server = Server(port, child, log)
        try:
            server.wait_ready()
            yield server
        finally:
            _stop(child)


def _header(answer: str, name: str) -> str | None:
    for line in answer.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            print("the server did not end by itself and is killed", file=sys.stderr)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # its own group: whatever is left of it
    child.wait()
