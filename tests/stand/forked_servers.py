"""Starts servers out of a process that has imported their modules, which spares them the seconds
that every start spends on imports: twice, in the main process and in its worker.

From its first line on such a server does what one started by ``python`` does, in as many processes:
the main process is forked from the one that has the modules, and where multiprocessing would have a
new interpreter import them for the worker, a twin that the main process made before its first line
forks it. What it takes a real interpreter to see is started by one: see `tests.stand.live`.

Run as a program it is that process: it forks once for every line that it is sent.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from multiprocessing import process, util
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from tests.stand import forked_ray

ROOT: Final = Path(__file__).parents[2]
# What the main process and the worker import sooner or later, but prometheus_client, which decides
# by the environment of its import.
MODULES: Final = (
    "server.cli.main",
    "server.edge.processes.serve",
    "server.engine.engine",
    "server.inputs.images",
    "server.inputs.text",
    "bitsandbytes",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
    "tests.stand.fake_engine",
    "tests.stand.fake_server",
)
RAY_WORKERS: Final = "FORK_RAY_WORKERS"  # in a server's environment: Ray's workers are forks, too
POLL_S: Final = 0.02
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
LARGEST: Final = 1 << 20  # bytes of a message


class ForkedServer:
    """The main process of a server, with the face of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, ask: Callable[[dict[str, Any]], Any]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ask = ask

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask({"status of": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status; raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(["server", str(self.pid)], timeout)
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended: its id may be another's by then."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Loaded:
    """The process that has the modules, as the tests see it; one for each process of pytest."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # OpenBLAS would make its threads when it is loaded; those of OpenMP are made at first use.
        more = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with far:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.stand.forked_servers", str(far.fileno())],
                cwd=ROOT,
                env={**environment, **more},
                pass_fds=(far.fileno(),),
            )
        atexit.register(self._near.close)

    def ask(self, message: dict[str, Any]) -> Any:
        with self._lock:
            self._near.send(json.dumps(message).encode())
            answer = self._near.recv(LARGEST)
        assert answer, "the process that forks servers has ended"
        return json.loads(answer)

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
    ) -> ForkedServer:
        """Start ``module`` as ``python -m`` would, in a session of its own, writing to ``log``."""
        told = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "log": str(log),
        }
        return ForkedServer(int(self.ask(told)), self.ask)


@cache
def loaded(environment: tuple[tuple[str, str], ...]) -> Loaded:
    """The process that has the modules; libraries may read ``environment`` when they are imported,
    so there is one for each."""
    return Loaded(dict(environment))


# From here on: in that process, and in those that it forks.


def _serve(asked: socket.socket) -> Callable[[], object]:
    """Answer until nobody asks any more; returns only in a forked process, with what it is to run.

    Raises:
        SystemExit: Nobody asks any more.
    """
    for name in MODULES:
        importlib.import_module(name)
    assert "prometheus_client" not in sys.modules
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    gc.collect()
    gc.freeze()  # or a collection would write to pages that all could share
    while message := asked.recv(LARGEST):
        told = json.loads(message)
        if "status of" in told:
            pid, status = os.waitpid(told["status of"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                asked.close()
                return _become(told)
        asked.send(json.dumps(answer).encode())
    raise SystemExit


def _become(told: dict[str, Any]) -> Callable[[], object]:
    """Be the main process of a server, or the twin's child that is its worker."""
    os.setsid()
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, given in enumerate((nothing, log, log)):
        os.dup2(given, number)
    os.close(nothing)
    os.close(log)
    sys.argv = [told["module"], *told["arguments"]]
    ours: Any = process
    ours.ORIGINAL_DIR = told["folder"]
    sys.modules["__main__"] = ModuleType("__main__")  # a worker has nothing to import of it
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    main = os.getpid()
    if os.fork() == 0:
        near.close()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        return _be_twin(far, main)
    far.close()
    spawning: Any = util
    spawning.spawnv_passfds = partial(_spawn, near, spawning.spawnv_passfds)
    if told["environment"].get(RAY_WORKERS):
        forked_ray.use_forks(partial(_fork, near))
    entry = importlib.import_module(told["module"]).main
    return partial(entry, *told["arguments"]) if entry.__code__.co_argcount else entry


def _spawn(
    twin: socket.socket, spawn: Callable[..., int], path: bytes, arguments: Sequence[Any], fds: Any
) -> int:
    """In the main process, in place of multiprocessing's way to run a new interpreter."""
    if "--multiprocessing-fork" not in arguments:
        return spawn(path, arguments, fds)
    told = {
        "arguments": [os.fsdecode(one) for one in arguments],
        "environment": dict(os.environ),
        "fds": list(fds),
    }
    return _fork(twin, told, list(fds))


def _fork(twin: socket.socket, told: dict[str, Any], fds: Sequence[int]) -> int:
    """In the main process: have its twin make a worker; returns its id."""
    # The worker's maker ends at once, and the worker becomes the child of who takes such orphans.
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(twin, [json.dumps(told).encode()], list(fds))
        return int(json.loads(twin.recv(LARGEST)))
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _be_twin(asked: socket.socket, main: int) -> Callable[[], object]:
    """In the twin: fork workers. Returns in a worker, with what a new interpreter would run."""
    if os.getppid() != main:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to the whole session is the main one's
    while True:
        message, fds, _, _ = socket.recv_fds(asked, LARGEST, 16)
        if not message:
            os._exit(0)
        told = json.loads(message)
        read, write = os.pipe()
        maker = os.fork()
        if maker == 0:
            worker = os.fork()
            if worker == 0:
                os.close(read)
                os.close(write)
                asked.close()
                return _be_worker(told, fds)
            os.write(write, str(worker).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(maker, 0)
        worker = int(os.read(read, 32))
        os.close(read)
        for one in fds:
            os.close(one)
        asked.send(json.dumps(worker).encode())


def _be_worker(told: dict[str, Any], fds: list[int]) -> Callable[[], object]:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(told["environment"])
    wanted = told["fds"]
    aside = [_above(one, max(wanted) + 1) for one in fds]  # a target may be another's source
    for source, target in zip(aside, wanted, strict=True):
        os.dup2(source, target)
        os.close(source)
    arguments = told["arguments"]
    sys.argv = ["-c", *arguments[arguments.index("-c") + 2 :]]
    return partial(exec, arguments[arguments.index("-c") + 1], {"__name__": "__main__"})


def _above(fd: int, least: int) -> int:
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return moved


def _run(action: Callable[[], object]) -> None:
    """Do what there is to do, and what an interpreter does at its end.

    But not its last part, which takes all modules apart: here that is to copy them first, because
    other processes have them too.
    """
    status: object = 0
    try:
        action()
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001  # as an interpreter does
        traceback.print_exc()
        status = 1
    ended: Any = threading
    ended._shutdown()  # waits for the threads that are no daemons
    at_exit: Any = atexit
    at_exit._run_exitfuncs()
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
