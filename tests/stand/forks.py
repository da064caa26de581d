"""Programs that start from a process which has imported torch and the rest once for all of them.

A server of the tests imports for five seconds of a core before it does anything. Here one process
imports, and forks for each program that is asked for; the fork has an environment, a folder, an
output and a session of its own, as a program that is executed has. What is read from the
environment before a program begins (the threads of torch) is that of the first process.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
# Not what reads the environment when it is imported: prometheus_client, and so litserve.
IMPORTED = (
    "torch", "transformers", "transformers.models.auto.modeling_auto", "bitsandbytes",
    "safetensors.torch", "fastapi", "pydantic_settings", "sqlalchemy", "uvicorn", "httptools",
    "typer", "psutil", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
    "transformers.models.distilbert.modeling_distilbert",
)  # fmt: skip


class Forked:
    """A program that runs, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, pid: int, status: Callable[[], int | None]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; ``subprocess.TimeoutExpired`` when there is none in time."""
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"forked {self.pid}", timeout or 0.0)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts programs; one for all tests of a process, see ``fork_server``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = "from tests.stand.forks import serve; serve()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._ended: dict[int, int] = {}
        self._pids: list[int] = []
        self._told = threading.Condition()
        threading.Thread(target=self._listen, name="fork-server", daemon=True).start()

    def run(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as ``subprocess.run`` does that captures what it says."""
        said = [cwd / f"said-{os.urandom(4).hex()}.{name}" for name in ("out", "err")]
        child = self.start(command, cwd=cwd, env=env, stdout=said[0], stderr=said[1])
        try:
            status = child.wait(timeout)
        finally:
            child.kill()
        out, err = (one.read_text() for one in said)
        return subprocess.CompletedProcess(list(command), status, out, err)

    def start(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
    ) -> Forked:
        """Run a program as ``python *command`` does.

        Args:
            command: ``-c CODE ARGUMENTS``.
            cwd: Its folder.
            env: All of its environment.
            stdout: Where its output goes; made anew.
            stderr: Where its errors go; to the output when None.
        """
        asked = {
            "command": list(command),
            "cwd": str(cwd),
            "env": dict(env),
            "stdout": str(stdout),
            "stderr": None if stderr is None else str(stderr),
        }
        assert self._child.stdin is not None
        with self._told:
            self._child.stdin.write(json.dumps(asked) + "\n")
            self._child.stdin.flush()
            assert self._told.wait_for(lambda: self._pids, 120), "the fork server does not answer"
            pid = self._pids.pop()
        return Forked(pid, lambda: self._ended.get(pid))

    def close(self) -> None:
        """End the process that forks; what it forked goes on."""
        self._child.kill()
        self._child.wait()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            kind, pid, *status = line.split()
            with self._told:
                if kind == "began":
                    self._ended.pop(int(pid), None)  # of a program before it, of the same number
                    self._pids.append(int(pid))
                else:
                    self._ended[int(pid)] = int(status[0])
                self._told.notify_all()


_servers: dict[int, ForkServer] = {}


def fork_server() -> ForkServer:
    """The one of this process, started when it is first asked for."""
    if os.getpid() not in _servers:
        path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        made = _servers[os.getpid()] = ForkServer({**os.environ, **path})
        atexit.register(made.close)
    return _servers[os.getpid()]


def serve() -> None:
    """The process that forks: reads what to start, a line each, and tells who began and ended."""
    for name in IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()
    told = os.dup(1)
    children: set[int] = set()
    buffer = b""
    # One thread: a fork of a process with more of them may hold a lock for ever.
    while True:
        children -= _tell_of_ended(children, told)
        if not select.select([0], [], [], 0.01)[0]:
            continue
        read = os.read(0, 1 << 20)
        if not read:
            return
        *whole, buffer = (buffer + read).split(b"\n")
        for line in whole:
            pid = os.fork()
            if pid == 0:
                os.close(told)
                _become(json.loads(line))
            children.add(pid)
            os.write(told, f"began {pid}\n".encode())


def _tell_of_ended(children: set[int], told: int) -> set[int]:
    ended = set()
    for pid in children:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.add(pid)
            os.write(told, f"ended {pid} {os.waitstatus_to_exitcode(status)}\n".encode())
    return ended


def _become(asked: dict[str, Any]) -> NoReturn:
    """In the fork: be the program."""
    status = 1
    try:
        os.setsid()
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(asked["stdout"], flags, 0o600), 1)
        os.dup2(1 if asked["stderr"] is None else os.open(asked["stderr"], flags, 0o600), 2)
        status = _run(asked["command"])
    except BaseException:  # noqa: BLE001  # whatever it is, it must not go on as the fork server
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(command: list[str]) -> int:
    option, code, *arguments = command
    assert option == "-c", command
    sys.argv = [option, *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:  # as the interpreter ends: non-daemon threads, then what was registered
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    return 0
