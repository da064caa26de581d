"""A few numbers that the main process and the HTTP processes share through forked memory.

Made before the fork and inherited. Every cell has one writer, so there are no locks: an HTTP
process writes its own load, the main process writes everything else.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from enum import IntEnum

_FORK = multiprocessing.get_context("fork")


class Phase(IntEnum):
    """Where the server is in its life."""

    SERVING = 0
    DRAINING = 1  # no new requests, running ones go on
    STOPPING = 2  # running ones end now


class SharedLoad:
    """Admitted requests, tokens and pixels of every HTTP process, and the phase of the whole.

    Args:
        http_processes: How many there are.
        clock: Seconds that only grow and are the same in all processes; beats are written in them.
    """

    def __init__(self, http_processes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = _FORK.RawArray("q", http_processes)
        self._tokens = _FORK.RawArray("q", http_processes)
        self._pixel_bytes = _FORK.RawArray("q", http_processes)
        self._pids = _FORK.RawArray("q", http_processes + 1)  # the last: the queues' process
        self._beats = _FORK.RawArray("d", http_processes)
        self._phase = _FORK.RawValue("i", int(Phase.SERVING))
        self._settings_age = _FORK.RawValue("q", 0)
        self._registry_changes = _FORK.RawArray("q", http_processes)
        self._key_changes = _FORK.RawArray("q", http_processes)

    @property
    def phase(self) -> Phase:
        return Phase(self._phase.value)

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase.value = int(phase)

    @property
    def settings_age(self) -> int:
        """How often the settings were reloaded."""
        return int(self._settings_age.value)

    def settings_changed(self) -> None:
        self._settings_age.value += 1

    def registry_changes(self) -> int:
        """Changes of the registry that HTTP processes have acknowledged; it only grows."""
        return sum(self._registry_changes)

    def registry_changed(self, http_process: int) -> None:
        """This HTTP process has changed the registry; before it says so to anybody.

        Its threads must take turns: the cell has one writer at a time.
        """
        self._registry_changes[http_process] += 1

    def keys_were_changed(self) -> bool:
        """Whether any HTTP process has taken over other keys of the keys file since the start."""
        return any(self._key_changes)

    def keys_changed(self, http_process: int) -> None:
        """This HTTP process has taken over other keys of the keys file."""
        self._key_changes[http_process] += 1

    def set(self, http_process: int, *, requests: int, tokens: int, pixel_bytes: int = 0) -> None:
        self._requests[http_process] = requests
        self._tokens[http_process] = tokens
        self._pixel_bytes[http_process] = pixel_bytes

    def requests(self) -> int:
        return sum(self._requests)

    def tokens(self) -> int:
        return sum(self._tokens)

    def pixel_bytes(self) -> int:
        return sum(self._pixel_bytes)

    def beat(self, http_process: int) -> None:
        """This HTTP process is alive; it says so several times a second, its maker before it is."""
        self._beats[http_process] = self._clock()

    def silent_s(self, http_process: int) -> float:
        """How long ago an HTTP process last was alive; 0 before its first beat."""
        last = self._beats[http_process]
        return self._clock() - last if last else 0.0

    def forget(self, http_process: int) -> None:
        """An HTTP process is gone, and what it had under way with it."""
        self.set(http_process, requests=0, tokens=0)
        self._beats[http_process] = 0.0

    def set_pid(self, http_process: int, pid: int) -> None:
        self._pids[http_process] = pid

    def set_queues_pid(self, pid: int) -> None:
        self._pids[-1] = pid

    def pids(self) -> dict[str, int]:
        """Process ids by role; 0 where a process has not been started."""
        roles = [f"http-{number}" for number in range(len(self._requests))] + ["queues"]
        return dict(zip(roles, self._pids, strict=True))
