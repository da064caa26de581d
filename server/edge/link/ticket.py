"""An admitted request as its endpoint sees it, and the bounds that it is admitted within."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from server.messages import TERMINAL, Event, Request


class RequestQueue(Protocol):
    """LitServe's request queue, as far as it is used here."""

    def put(self, item: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be admitted at once, over all HTTP processes."""

    requests: int
    tokens: int
    adapter_requests: int
    adapter_tokens: int | None = None  # None: no bound but that of all
    pixel_bytes: int | None = None  # None: no bound but that of tokens

    def token_share(self, processes: int) -> int | None:
        """`share`, of tokens."""
        if self.adapter_tokens is None:
            return None
        return max(1, math.ceil(self.adapter_tokens / processes))

    def share(self, processes: int) -> int:
        """One process's part of the bound per adapter, which is not counted across them."""
        return max(1, math.ceil(self.adapter_requests / processes))


class Ticket:
    """One admitted request: its events arrive here, in order, the last one terminal."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ended = False
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        if self.ended:
            return
        self.ended = isinstance(event, TERMINAL)
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Event:
        """Wait for the next event."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def next_if_there(self) -> Event | None:
        """The next event if it has come already: a step's events come together."""
        return self._events.popleft() if self._events else None
