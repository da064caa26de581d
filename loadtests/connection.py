"""A cheap HTTP client for load: one keep-alive connection, requests encoded beforehand.

The generator shares the machine with the server that it measures, so it must cost little: a request
is bytes that are ready to send, and llhttp parses what comes back. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httptools

OPEN_S = 10.0


class Lost(Exception):
    """The connection ended before the answer did; the text says what was there by then."""


@dataclass(slots=True)
class Reply:
    """One answer."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)  # names in lower case
    body: bytes = b""
    ended: float = 0.0  # monotonic

    def header(self, name: str) -> str | None:
        value = self.headers.get(name.lower().encode())
        return None if value is None else value.decode("latin-1")

    def json(self) -> Any:
        return json.loads(self.body)

    def code(self) -> str:
        """The status and, of an error, its code: ``503 worker_lost``."""
        try:
            answer = self.json()
            return f"{self.status} {answer.get('code') or answer['error']['code']}"
        except (ValueError, KeyError, AttributeError, TypeError):
            return str(self.status)


def encoded(
    path: str, body: Any = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
) -> bytes:
    """A whole request as bytes; ``body`` is sent as JSON unless it is bytes already."""
    content = b""
    if body is not None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(content)}"]
    given = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        given.setdefault("Content-Type", "application/json")
    lines += [f"{name}: {value}" for name, value in given.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reply = Reply()
        self._pieces: list[bytes] = []
        self._waiter: asyncio.Future[Reply] | None = None
        self._on_piece: Callable[[bytes], None] | None = None
        self.usable = False

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to 127.0.0.1; raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(OPEN_S):
            _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    async def ask(self, raw: bytes, on_piece: Callable[[bytes], None] | None = None) -> Reply:
        """Send a request and wait for the whole answer.

        Args:
            raw: As `encoded` makes it.
            on_piece: Called with each piece of the body as it comes.

        Raises:
            Lost: The server closed the connection before the answer was complete.
        """
        assert self._waiter is None, "one request at a time"
        if not self.usable or self._transport is None:
            raise Lost("the connection was closed before the request was sent")
        self._reply, self._pieces, self._on_piece = Reply(), [], on_piece
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(raw)
        try:
            return await self._waiter
        except asyncio.CancelledError:
            self.abort()  # what comes now would be taken for the next answer
            raise
        finally:
            self._waiter = None

    def abort(self) -> None:
        """Leave at once, as a client that is killed does."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.usable = transport, True

    def data_received(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._fail(f"closed after status {self._reply.status}: {error}")

    # httptools

    def on_status(self, _: bytes) -> None:
        self._reply.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.lower()] = value

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if self._on_piece is not None:
            self._on_piece(piece)

    def on_message_complete(self) -> None:
        reply = self._reply
        reply.status = self._parser.get_status_code()
        reply.body = b"".join(self._pieces)
        reply.ended = time.monotonic()
        if not self._parser.should_keep_alive():
            self.usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(reply)

    def _fail(self, why: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Lost(why))
