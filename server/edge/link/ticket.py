"""An admitted request as its endpoint sees it, and the bounds that it is admitted within."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

from server.messages import TERMINAL, Event, Request


class RequestQueue(Protocol):
    """LitServe's request queue, as far as it is used here."""

    def put(self, item: Any) -> None: ...


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
