"""What the main process makes of a worker's silence, without any process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from server.edge.supervise import Supervisor
from server.edge.wire import WorkerState, state_path, write_state

PID = 77
HANG_S = 10.0


class Worker:
    pid = PID
    exitcode = None

    def __init__(self) -> None:
        self.killed = False

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True

    def join(self, _: float) -> None:
        return


class Server:
    """What the supervisor reads of one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.hang_s = self.max_step_s = HANG_S
        self.drain_s = 0.0
        self.settings = self.service = self.load = self
        self.inference_workers = [Worker()]
        self.phase: Any = None

    def requests(self) -> int:
        return 0


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def supervisor(server: Server) -> Supervisor:
    given: Any = server
    return Supervisor(given, on_ready=lambda: None, upkeep=lambda: None)


def speak(server: Server, *, pid: int = PID, silent_s: float = 0.0, busy_s: float = 0.0) -> None:
    beat = time.monotonic() - silent_s
    write_state(server.run_dir, WorkerState(0, f"{pid}-1", pid, 0.0, beat, busy_s))


def is_killed(supervisor: Supervisor, server: Server) -> bool:
    supervisor._kill_hung({})
    return server.inference_workers[0].killed


def test_state_that_is_gone_after_the_worker_was_ready_is_silence(
    supervisor: Supervisor, server: Server
) -> None:
    speak(server, silent_s=HANG_S - 5)
    supervisor._check_worker()
    state_path(server.run_dir, 0).unlink()
    assert not is_killed(supervisor, server), "not before it has been silent for so long"
    supervisor._heard_at -= 6
    assert is_killed(supervisor, server)


def test_state_of_the_worker_before_tells_nothing_of_one_that_starts(
    supervisor: Supervisor, server: Server
) -> None:
    speak(server, pid=PID - 1, silent_s=HANG_S * 3, busy_s=HANG_S * 3)
    supervisor._check_worker()
    assert not is_killed(supervisor, server)


def test_step_that_takes_too_long_is_ended(supervisor: Supervisor, server: Server) -> None:
    speak(server)
    supervisor._check_worker()
    assert not is_killed(supervisor, server)
    speak(server, busy_s=HANG_S + 1)
    assert is_killed(supervisor, server)


def test_drain_ends_without_a_run_folder(supervisor: Supervisor, server: Server) -> None:
    server.run_dir /= "gone"
    supervisor._drain()
