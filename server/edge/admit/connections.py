"""What one connection may cost: the size of a request's head, and the time a client may take.

uvicorn bounds none of these with its fast parser: a head may be endless or never end, as may the
trailers of a chunked body, which it adds to the headers of the running request; a client that
stops reading holds its answer for ever, and connections are as many as come. A head that has
arrived whole is refused by `RequestMiddleware`, which knows how to answer; the others are answered
here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import resource
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import PROBLEM_TYPE, Refusal

# Anybody can send nonsense, or ask for another protocol: with a line in the log for each they could
# fill the disk. They are counted.
logger = logging.getLogger("uvicorn.error.connection")
logger.setLevel(logging.ERROR)

HEADERS_MAX: Final = 100
SPARE_DESCRIPTORS: Final = 256  # for files, the database, queues and the threads' own
HEAD_FAULT: Final = "hira.head"  # in the scope: the refusal of a head that is too large


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of one HTTP process.

    Args:
        connections: Open at once.
        head_bytes: Of the request line and the headers together.
        patience_s: For a head to arrive, for a client to read on, and between two requests.
    """

    connections: int
    head_bytes: int
    patience_s: float


class _OneAtATime(FlowControl):
    """Reads no further while a request that came too early waits its turn: uvicorn would take in
    all that a client cares to send ahead."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol within limits.

    Args:
        limits: What it may cost.
        count: Called with the code of every refusal that is answered here.
    """

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        count: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logger
        self._limits = limits
        self._count = count
        self._in_head = True
        self._head_bytes = 0
        self._framing_bytes = 0  # since the last byte of a body: chunk sizes, trailers
        self._waits_since = math.inf  # monotonic, for a head; inf while a request runs
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # Life of a connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _OneAtATime(transport, self.pipeline)
        if len(self.connections) > self._limits.connections and not self._make_room():
            self._refuse(
                Refusal.because(
                    "too_many_connections",
                    "Too many connections are open.",
                    expected=f"at most {self._limits.connections}",
                    fix="Keep a few connections and send many requests over each.",
                )
            )
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        self._unstall()
        super().connection_lost(exc)
        # Whatever ended it: a timer that is left would keep this object alive.
        self._unset_keepalive_if_required()

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if not self._in_head and self._framing_bytes > self._limits.head_bytes:
            self._count("head_too_large")
            self.transport.abort()  # its request runs, or has its answer: there is no other to give
        elif self._in_head and self._head_bytes > self._limits.head_bytes:
            self._refuse(self._too_large(f"more than {self._limits.head_bytes} bytes"))
        elif self._is_idle():
            # A part of a head, the rest of a body that nobody reads, or empty lines.
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, which nothing here has a use for
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = self._framing_bytes = 0
        self._stop_awaiting()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes:
            self.scope[HEAD_FAULT] = self._too_large(f"{size} bytes")  # type: ignore[typeddict-unknown-key]
        elif len(self.headers) > HEADERS_MAX:
            self.scope[HEAD_FAULT] = Refusal.because(  # type: ignore[typeddict-unknown-key]
                "head_too_large",
                "The request has too many headers.",
                found=f"{len(self.headers)} headers",
                expected=f"at most {HEADERS_MAX}",
                headers={"Connection": "close"},
            )
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            Refusal.because(
                "malformed_request", "This is not an HTTP request.", expected="HTTP/1.1"
            )
        )

    # Writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall()

    def resume_writing(self) -> None:
        self._unstall()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._stall()  # the rest of the answer has that long to leave
        elif self._is_idle():
            self._waits_since = time.monotonic()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # its client has not even read the last answer
        else:
            super().timeout_keep_alive_handler()

    # Inside

    def _is_idle(self) -> bool:
        """Whether no request runs on this connection."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> bool:
        """Close the connection that has been waiting longest for a request; False if none is."""
        others = (one for one in self.connections if one is not self)
        oldest = min(others, key=_waits_since, default=None)
        if oldest is None or _waits_since(oldest) == math.inf:
            return False
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._waits_since = time.monotonic()
            self._head_timer = self.loop.call_later(self._limits.patience_s, self._give_up)

    def _stop_awaiting(self) -> None:
        self._waits_since = math.inf
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not (self._in_head and self._head_bytes):
            self.transport.close()  # it never said a word, or sends a body that nobody wants
            return
        self._refuse(
            Refusal.because(
                "head_too_slow",
                "The request did not arrive in time.",
                expected=f"{self._limits.patience_s:g} s",
            )
        )

    def _stall(self) -> None:
        if self._stall_timer is None and self.transport.get_write_buffer_size():
            self._stall_timer = self.loop.call_later(self._limits.patience_s, self.transport.abort)

    def _unstall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _too_large(self, found: str) -> Refusal:
        return Refusal.because(
            "head_too_large",
            "The request's line and headers are too large.",
            found=found,
            expected=f"at most {self._limits.head_bytes} bytes",
            fix="Send inputs in the body.",
            headers={"Connection": "close"},
        )

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what never became a request, and close."""
        self._stop_awaiting()
        if not self._is_idle():
            self.transport.abort()  # in the middle of another answer: no second one fits there
            return
        self._count(refusal.code)
        body = json.dumps(refusal.problem(), separators=(",", ":")).encode()
        lines = [
            STATUS_LINE[refusal.status],
            f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\n".encode(),
            b"connection: close\r\n",
            b"retry-after: 1\r\n" if refusal.status == 503 else b"",
            b"\r\n",
            body,
        ]
        self.transport.write(b"".join(lines))
        self.transport.close()
        self._stall()


def make_room_for_connections(connections: int) -> int:
    """Raise this process's limit of file descriptors, for it and its children, where it can be.

    Returns:
        How many connections fit: ``connections``, or fewer where the system allows no more.
    """
    wanted = connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - SPARE_DESCRIPTORS))


def _waits_since(connection: Any) -> float:
    """Since when a connection has waited for a head; infinite while it does not."""
    since: float = getattr(connection, "_waits_since", math.inf)
    return since
