"""Which HTTP processes wait for answers of the worker, and what each of them waits for.

The worker watches their pids as they watch its: what a process asked for that died is cancelled, or
it would run to its end for nobody, in room that new requests count on.
"""

from __future__ import annotations

import os
import select
from collections import defaultdict
from collections.abc import Iterable

from server.messages import TERMINAL, Cancel, EncodeRequest, Event, GenerateRequest, Message


class HttpProcesses:
    """The living HTTP processes; used by one thread."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}  # by pid
        self._poll = select.poll()

    def lives(self, pid: int) -> bool:
        """Whether a process still waits for its answers; it is watched from now on."""
        if pid in self._pidfds:
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self._pidfds[pid] = pidfd
        self._poll.register(pidfd, select.POLLIN)
        return True

    def gone(self) -> list[int]:
        """Pids of those that have died since the last call."""
        ready = {pidfd for pidfd, _ in self._poll.poll(0)}
        found = [pid for pid, pidfd in self._pidfds.items() if pidfd in ready]
        for pid in found:
            pidfd = self._pidfds.pop(pid)
            self._poll.unregister(pidfd)
            os.close(pidfd)
        return found


class RunningRequests:
    """Ids of the requests under way, by the pid of who waits for them."""

    def __init__(self) -> None:
        self._ids: defaultdict[int, set[str]] = defaultdict(set)
        self._pids: dict[str, int] = {}

    def begin(self, pid: int, message: Message) -> None:
        """``message`` goes to the engine; a Cancel may take its request's events with it."""
        match message:
            case EncodeRequest() | GenerateRequest():
                self._ids[pid].add(message.id)
                self._pids[message.id] = pid
            case Cancel():
                self._forget(message.id)

    def end(self, events: Iterable[Event]) -> None:
        """The engine has said this: who has a terminal event is done."""
        for event in events:
            if isinstance(event, TERMINAL):
                self._forget(event.id)

    def abandoned(self, pid: int) -> list[str]:
        """The requests of a process that is gone; they are not under way any more."""
        ids = sorted(self._ids.pop(pid, ()))
        for one in ids:
            del self._pids[one]
        return ids

    def _forget(self, one: str) -> None:
        pid = self._pids.pop(one, None)
        if pid is not None:
            self._ids[pid].discard(one)
