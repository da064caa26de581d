"""The main process, once all others run: sees deaths, restarts, drains, and ends in order.

Runs in the main thread, because the kernel ties a child's life to the thread that made it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from types import FrameType
from typing import Any, Final

from server.edge.admit.shared_load import Phase
from server.edge.link.worker_state import (
    fault_path,
    read_stage,
    read_state,
    state_path,
    stopping_path,
)
from server.edge.litserve.server import HiraServer
from server.edge.processes.failed_start import StartFailed
from server.settings import SettingsFault
from server.stages import tell_stage

logger = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
SUPERVISE_EVERY_S: Final = 0.25
HEALTHY_S: Final = 20.0  # a worker that ran so long starts afresh with its pauses
PAUSE_MAX_S: Final = 60.0
# A process killed while it waits in LitServe's response queue leaves that wait behind in the
# queue's process: for the rest of its second it swallows what was meant for the successor.
HTTP_PAUSE_S: Final = 1.2
KILL_S: Final = 5.0  # for the kernel to end a process that was sent SIGKILL
TRIES: Final = 8  # starts in a row that never became ready
TURN_S: Final = 3.0  # a turn that takes longer: the machine did not run this process meanwhile
STALLS_KEPT: Final = 256


class Supervisor:
    """See the module.

    Args:
        server: Whose processes these are.
        on_ready: Called once, when the first worker answers.
        upkeep: Called about once a second, before anything is started anew.
        clock: Seconds that only grow, those in which beats are written.
    """

    def __init__(
        self,
        server: HiraServer,
        *,
        on_ready: Callable[[], None],
        upkeep: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = server
        self.load = server.service.load
        self.settings = server.service.settings
        self.failure: str | None = None
        self._on_ready = on_ready
        self._upkeep = upkeep
        self._clock = clock
        self._stop_signals = 0
        self._reload = False
        self._was_ready = False
        self._ready_epoch: str | None = None
        self._heard_at = 0.0  # the beat of the last state that was read
        self._worker_started = self._clock()
        self._failed_starts = 0
        self._killed_because: str | None = None
        self._turned_at: float | None = None
        # When this process itself did not run, from and to: nobody's silence then says anything.
        self._stalls: deque[tuple[float, float]] = deque(maxlen=STALLS_KEPT)
        self._restart_at: float | None = None
        self._http_restart_at: dict[int, float] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def install(self) -> None:
        """Take the signals of the main process; to be called before any child is made."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_signal)

    def run(self, http: dict[int, ForkProcess]) -> None:
        """Watch until a signal or a failure says to end; then drain.

        Raises:
            StartFailed: The first worker could not be set up, or workers die one after another.
        """
        duties: tuple[Callable[[], None], ...] = (
            self.note_turn,
            self._upkeep,  # first: whoever is started needs the run folder
            self._check_queues,  # whose process the others may have to ask
            lambda: self.kill_hung(http),
            self.check_worker,
            lambda: self._check_http(http),
            self._try_reload,
            lambda: self._sleep(http),
        )
        while not self._stop_signals:
            done = [self._does(duty) for duty in duties]  # each, whatever becomes of the others
            if not all(done):
                time.sleep(SUPERVISE_EVERY_S)
        self.drain()

    def _does(self, duty: Callable[[], None]) -> bool:
        """Whether a duty was done. One that fails is tried again at the next turn: with this
        process all others would end."""
        try:
            duty()
        except StartFailed:
            raise
        except Exception:
            logger.exception("A duty of the main process failed and is tried again")
            return False
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop_signals += 1
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            return  # a full pipe wakes as well

    def _sleep(self, http: Mapping[int, ForkProcess]) -> None:
        waiting = self._restart_at is not None or bool(self._http_restart_at)
        alive = [one for one in self.server.inference_workers if self._restart_at is None]
        sentinels = [
            *(one.sentinel for one in alive),
            *(one.sentinel for at, one in http.items() if at not in self._http_restart_at),
            self._wake_read,
        ]
        timeout = SUPERVISE_EVERY_S if waiting or not self._was_ready else 1.0
        if self._wake_read in wait(sentinels, timeout=timeout):
            os.read(self._wake_read, 4096)

    def check_worker(self) -> None:
        (worker,) = self.server.inference_workers
        if self._restart_at is not None:
            if self._clock() >= self._restart_at:
                self._restart()
            return
        self._look_for_ready(worker)  # also of a dead one: it may have been ready in between
        if worker.is_alive():
            return
        reason = self._why(worker)
        try:
            state_path(self.settings.run_dir, 0).unlink(missing_ok=True)
        except OSError as error:  # it names a process that is no more
            logger.error("The dead worker's state could not be removed: %s", error)
        became_ready = self._ready_epoch is not None
        self._ready_epoch = None
        if not self._was_ready:
            raise StartFailed(reason)
        ran_s = self._clock() - self._worker_started
        if became_ready and ran_s >= HEALTHY_S:
            self._failed_starts = 0
        self._failed_starts += 1
        if not became_ready and self._failed_starts > TRIES:
            raise StartFailed(f"the worker died {self._failed_starts} times in a row: {reason}")
        # At once after a single death; ever slower in a crash loop.
        pause_s = (
            0.0
            if self._failed_starts == 1
            else min(PAUSE_MAX_S, 0.5 * 2.0 ** (self._failed_starts - 2))
        )
        self._restart_at = self._clock() + pause_s
        logger.error("The inference worker died (%s); a new one starts in %.1f s", reason, pause_s)

    def note_turn(self) -> None:
        """A turn begins. What the one before took beyond ``TURN_S`` is no time in which a worker
        could have been heard: on a machine that stood still, all would be found silent at once."""
        now, before = self._clock(), self._turned_at
        self._turned_at = now
        if before is not None and now - before > TURN_S:
            self._stalls.append((before + TURN_S, now))
            logger.warning("The main process did not run for %.0f s", now - before)

    def _running_s(self, seconds: float) -> float:
        """The part of the latest ``seconds`` in which this process ran."""
        now = self._clock()
        since = now - seconds
        return seconds - sum(max(0.0, to - max(at, since)) for at, to in self._stalls)

    def kill_hung(self, http: Mapping[int, ForkProcess]) -> None:
        """End what lives and does nothing: its successor serves, and its requests have an end."""
        limit_s = self.settings.hang_s
        (worker,) = self.server.inference_workers
        state = read_state(self.settings.run_dir)
        if state is not None and state.pid != worker.pid:
            state = None  # of the worker before
        if state is not None:
            self._heard_at = state.beat
        if not worker.is_alive() or self._restart_at is not None:
            pass
        elif self._ready_epoch is None:
            loading_s = self._running_s(self._clock() - self._worker_started)
            if state is None and loading_s > self.settings.max_setup_s:
                self._kill(worker, f"not ready after {loading_s:.0f} s (max_setup_s)")
        else:
            # A state that is gone after the worker was ready is silence as well.
            silent_s = self._running_s(self._clock() - self._heard_at)
            if silent_s > limit_s:
                self._kill(worker, f"no sign of life for {silent_s:.0f} s")
            elif state is not None and self._running_s(state.busy_s) > self.settings.max_step_s:
                self._kill(worker, f"one step has taken {state.busy_s:.0f} s")
            elif state is not None and self._running_s(state.queue_silent_s) > limit_s:
                # Nobody can be served without it, nor be told so: end rather than hang.
                self.server.queues.kill()
                silent_s = state.queue_silent_s
                raise StartFailed(
                    f"LitServe's queue process gave no sign of life for {silent_s:.0f} s"
                )
        for number, child in http.items():
            silent_s = self._running_s(self.load.silent_s(number))
            if child.is_alive() and silent_s > limit_s:
                logger.error("HTTP process %d: no sign of life for %.0f s", number, silent_s)
                child.kill()
                child.join(KILL_S)

    def _kill(self, worker: Any, why: str) -> None:
        self._killed_because = why
        worker.kill()  # also of a stopped process
        worker.join(KILL_S)

    def _look_for_ready(self, worker: Any) -> None:
        if self._ready_epoch is not None:
            return
        state = read_state(self.settings.run_dir)
        if state is None or state.pid != worker.pid:
            stage = None if self._was_ready else read_stage(self.settings.run_dir)
            if stage is not None:
                tell_stage(stage.name, stage.done, stage.total)
            return
        self._ready_epoch = state.epoch
        self._heard_at = state.beat
        if not self._was_ready:
            self._was_ready = True
            self._on_ready()
        else:
            logger.warning("A new inference worker is ready (pid %d)", worker.pid)

    def _restart(self) -> None:
        self._restart_at = None
        self._worker_started = self._clock()
        (api,) = self.server.litapi_connector
        self.server.inference_workers = [self.server.launch_single_inference_worker(api, 0)]

    def _why(self, worker: Any) -> str:
        path = fault_path(self.settings.run_dir, 0)
        try:
            reason = path.read_text(encoding="utf-8").strip()
            path.unlink()
            return reason
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.error("Why the worker ended cannot be read: %s", error)
        if self._killed_because is not None:
            reason, self._killed_because = f"killed: {self._killed_because}", None
            return reason
        code = worker.exitcode
        if code is not None and code < 0:
            name = _signal_name(-code)
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        return f"exit status {code}"

    def _check_http(self, http: dict[int, ForkProcess]) -> None:
        now = self._clock()
        for number, child in list(http.items()):
            if child.is_alive() or self._stop_signals:
                continue
            if number not in self._http_restart_at:
                logger.error("HTTP process %d died (status %s)", number, child.exitcode)
                self.load.forget(number)
                self._http_restart_at[number] = now + HTTP_PAUSE_S
            elif now >= self._http_restart_at[number]:
                del self._http_restart_at[number]
                assert self.server.start_http is not None
                http[number] = self.server.start_http(number)

    def _try_reload(self) -> None:
        """Read the settings here first: the HTTP processes only hear of those that are right."""
        if not self._reload:
            return
        self._reload = False
        try:
            self.server.service.read_settings()
        except SettingsFault as fault:
            logger.error("SIGHUP: the settings stay as they were: %s", fault)
            return
        logger.warning("SIGHUP: the settings were read again")
        self.load.settings_changed()

    def _check_queues(self) -> None:
        if not self.server.queues.is_alive():
            raise StartFailed("LitServe's queue process died; the server ends")

    def drain(self) -> None:
        """No new requests; running ones have until the bound, or until a second signal."""
        self.load.phase = Phase.DRAINING
        until = self._clock() + self.settings.drain_s
        logger.warning("Stopping: %d requests are running", self.load.requests())
        signals = self._stop_signals
        while self.load.requests() and self._clock() < until and self._stop_signals == signals:
            time.sleep(0.05)
        self.load.phase = Phase.STOPPING
        if self.load.requests():
            time.sleep(0.6)  # the dispatchers see it within a tick and answer
        try:
            stopping_path(self.settings.run_dir).touch()
        except OSError as error:  # the run folder is gone: the worker ends when it is idle
            logger.error("The worker cannot be told that the drain is over: %s", error)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have none
        return f"signal {number}"
