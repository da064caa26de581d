"""Turning inputs into tokens or pixels off the event loop: in order, and only for who still waits.

One thread a lane, as tokenizers keep state. What waits for it waits here, where it is counted, has
a deadline and is dropped at once when its client leaves; nothing queues inside the executor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class TokenizersBusy(Exception):
    """As many wait for the encoders as may."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait to be encoded")
        self.waiting = waiting


class TokenizerThreads:
    """See the module. Made on the event loop that uses it."""

    def __init__(self, name: str = "tokenize") -> None:
        self.waiting = 0  # those at work with them
        self._turn = asyncio.Semaphore(1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def idle(self) -> bool:
        """Whether nothing runs on the thread or waits for it."""
        return not self.waiting and not self._turn.locked()

    async def run(self, work: Callable[[], T], *, deadline: float, most: int) -> T:
        """Run one piece of work in its turn.

        Args:
            work: Called on the thread; its exceptions are passed on.
            deadline: When the answer is of no use any more, as ``time.monotonic()`` counts.
            most: How many may wait.

        Raises:
            TokenizersBusy: Come back later.
            TimeoutError: The deadline passed; work that had not begun is never begun.
        """
        if self.waiting >= most:
            raise TokenizersBusy(self.waiting)
        if deadline <= time.monotonic():
            raise TimeoutError
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._turn.acquire()
                running = asyncio.get_running_loop().run_in_executor(self._thread, work)
                # Not before the thread is free, even if nobody waits for this piece any more.
                running.add_done_callback(self._done)
                return await asyncio.shield(running)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _done(self, running: asyncio.Future[T]) -> None:
        self._turn.release()
        if not running.cancelled():
            running.exception()  # it is passed on where somebody waits, else nobody's affair
