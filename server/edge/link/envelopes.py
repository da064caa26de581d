"""What travels through LitServe's queues between the HTTP processes and the worker.

One envelope each way, so that a step's events, or a burst of requests, cost one queue operation.
An envelope names the epoch of the worker that it is for or from: after a restart, neither side
takes the other's leftovers for its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from server.messages import Event, Message

EVENTS_UID: Final = "events"  # the one key under which every HTTP process listens


@dataclass(frozen=True, slots=True)
class Requests:
    """HTTP process → worker."""

    epoch: str
    messages: tuple[Message, ...]
    pid: int  # of the HTTP process


@dataclass(frozen=True, slots=True)
class Events:
    """Worker → HTTP process."""

    epoch: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """Worker → every HTTP process: the base is loaded, requests of this epoch are taken."""

    epoch: str
    pid: int


def request_id(http_process: int, number: int) -> str:
    """An id that says which HTTP process waits for the answer."""
    return f"{http_process}.{number}"


def http_process_of(request: str) -> int:
    """The inverse of `request_id`, as far as routing needs it."""
    return int(request.split(".", 1)[0])
