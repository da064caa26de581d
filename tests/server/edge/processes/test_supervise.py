"""What the main process makes of a worker's silence, without any process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from server.edge.admit.shared_load import SharedLoad
from server.edge.link.worker_state import WorkerState, fault_path, state_path, write_state
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.supervise import Supervisor
from tests.stand.clock import FakeClock

PID = 77
HANG_S = 10.0
SETUP_S = 60.0


class Worker:
    def __init__(self, pid: int = PID) -> None:
        self.pid = pid
        self.killed = False
        self.exitcode: int | None = None

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True
        self.exitcode = -9

    def join(self, _: float) -> None:
        return


class Server:
    """What the supervisor reads of one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.hang_s = self.max_step_s = HANG_S
        self.max_setup_s = SETUP_S
        self.drain_s = 0.0
        self.settings = self.service = self.load = self
        self.inference_workers = [Worker()]
        self.phase: Any = None
        self.queues = Worker()
        self.litapi_connector = [None]

    def launch_single_inference_worker(self, _: Any, __: int) -> Worker:
        return Worker(PID + 1)

    def requests(self) -> int:
        return 0


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.monotonic())  # beats are written by the machine's clock


@pytest.fixture
def supervisor(server: Server, clock: FakeClock) -> Supervisor:
    given: Any = server
    return Supervisor(given, on_ready=lambda: None, upkeep=lambda: None, clock=clock)


def speak(
    server: Server,
    *,
    pid: int = PID,
    silent_s: float = 0.0,
    busy_s: float = 0.0,
    queue_silent_s: float = 0.0,
) -> None:
    beat = time.monotonic() - silent_s
    state = WorkerState(0, f"{pid}-1", pid, beat, busy_s, queue_silent_s=queue_silent_s)
    write_state(server.run_dir, state)


def is_killed(supervisor: Supervisor, server: Server) -> bool:
    supervisor.kill_hung({})
    return server.inference_workers[0].killed


def test_state_that_is_gone_after_the_worker_was_ready_is_silence(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    speak(server, silent_s=HANG_S - 5)
    supervisor.check_worker()
    state_path(server.run_dir, 0).unlink()
    assert not is_killed(supervisor, server), "not before it has been silent for so long"
    clock.advance(6)
    assert is_killed(supervisor, server)


def test_time_in_which_the_main_process_itself_stood_still_is_nobodys_silence(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    speak(server)
    supervisor.check_worker()
    supervisor.note_turn()
    clock.advance(10 * HANG_S)
    supervisor.note_turn()
    assert not is_killed(supervisor, server), "it could not have been heard"
    seconds = 0
    while not is_killed(supervisor, server) and seconds < 2 * HANG_S:
        seconds += 1
        clock.advance(1)
        supervisor.note_turn()
    assert HANG_S / 2 < seconds <= HANG_S + 1, "nor did it speak when it could be heard"


def test_main_process_that_is_always_slow_still_ends_what_is_silent(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    speak(server)
    supervisor.check_worker()
    for _ in range(int(HANG_S)):
        supervisor.note_turn()
        supervisor.kill_hung({})
        clock.advance(HANG_S)
    supervisor.note_turn()
    assert is_killed(supervisor, server)


def test_state_of_the_worker_before_tells_nothing_of_one_that_starts(
    supervisor: Supervisor, server: Server
) -> None:
    speak(server, pid=PID - 1, silent_s=HANG_S * 3, busy_s=HANG_S * 3)
    supervisor.check_worker()
    assert not is_killed(supervisor, server)


def test_step_that_takes_too_long_is_ended(supervisor: Supervisor, server: Server) -> None:
    speak(server)
    supervisor.check_worker()
    assert not is_killed(supervisor, server)
    speak(server, busy_s=HANG_S + 1)
    assert is_killed(supervisor, server)


def test_drain_ends_without_a_run_folder(supervisor: Supervisor, server: Server) -> None:
    server.run_dir /= "gone"
    supervisor.drain()


def test_first_worker_that_hangs_in_its_setup_ends_the_start(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    clock.advance(SETUP_S - 5)
    assert not is_killed(supervisor, server), "it may take its time"
    clock.advance(10)
    assert is_killed(supervisor, server)
    with pytest.raises(StartFailed, match="max_setup_s"):
        supervisor.check_worker()


def test_restarted_worker_that_hangs_in_its_setup_is_killed_and_replaced(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    speak(server)
    supervisor.check_worker()
    server.inference_workers[0].kill()
    supervisor.check_worker()
    supervisor.check_worker()
    second = server.inference_workers[0]
    assert second.pid == PID + 1
    assert not is_killed(supervisor, server)
    clock.advance(SETUP_S + 5)
    assert is_killed(supervisor, server)
    supervisor.check_worker()
    assert server.inference_workers[0] is second, "not at once"
    clock.advance(60)
    supervisor.check_worker()
    assert server.inference_workers[0] is not second


def test_http_process_that_hangs_in_its_start_is_killed(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    supervisor.load = SharedLoad(1, clock=clock)
    supervisor.load.beat(0)  # by its maker
    child: Any = Worker()
    supervisor.kill_hung({0: child})
    assert not child.killed
    clock.advance(HANG_S + 1)
    supervisor.kill_hung({0: child})
    assert child.killed


def test_silent_queues_end_the_server(supervisor: Supervisor, server: Server) -> None:
    speak(server, queue_silent_s=HANG_S - 1)
    supervisor.check_worker()
    supervisor.kill_hung({})
    speak(server, queue_silent_s=HANG_S + 1)
    with pytest.raises(StartFailed, match="no sign of life"):
        supervisor.kill_hung({})
    assert server.queues.killed, "or the end would wait for it"


def test_state_that_cannot_be_read_is_silence_and_not_the_end(
    supervisor: Supervisor, server: Server, clock: FakeClock
) -> None:
    speak(server)
    supervisor.check_worker()
    state_path(server.run_dir, 0).unlink()
    state_path(server.run_dir, 0).mkdir()  # EISDIR
    assert not is_killed(supervisor, server)
    clock.advance(HANG_S + 1)
    assert is_killed(supervisor, server)
    fault_path(server.run_dir, 0).mkdir()
    killed = server.inference_workers[0]
    supervisor.check_worker()
    clock.advance(60)
    supervisor.check_worker()
    assert server.inference_workers[0] is not killed, "it was replaced"


@pytest.mark.parametrize("error", [OSError(5, "an error of the disk"), ValueError("unforeseen")])
def test_duty_that_fails_keeps_none_of_the_others(
    server: Server, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def upkeep() -> None:
        turns.append("upkeep")
        raise error

    given: Any = server
    supervisor = Supervisor(given, on_ready=lambda: None, upkeep=upkeep)
    speak(server)

    def sleep(_: object) -> None:
        turns.append("asleep")
        if len(turns) >= 4:
            supervisor._stop_signals = 1

    monkeypatch.setattr(supervisor, "_sleep", sleep)
    supervisor.run({})
    assert turns == ["upkeep", "asleep"] * 2
    assert supervisor._ready_epoch == f"{PID}-1", "the worker was looked at"


@pytest.mark.parametrize(("status", "reason"), [(9, "SIGKILL"), (36, "signal 36")])
def test_death_by_any_signal_is_named(
    supervisor: Supervisor, server: Server, status: int, reason: str
) -> None:
    worker = server.inference_workers[0]
    worker.exitcode = -status
    assert reason in supervisor._why(worker)
