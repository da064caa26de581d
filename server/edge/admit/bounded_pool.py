"""Slow work off the event loop: bounded in number and bytes, and only for who still waits.

What waits for a thread waits here, where it is counted, has a deadline and is dropped at once when
its client leaves; nothing queues inside the executor. A piece of work that never ends would take
its thread, and perhaps a tokenizer's lock, for ever: it is told of, and so is everybody behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class PoolFull(Exception):
    """As much waits for a pool as may; ``found`` and ``expected`` say of what."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; {expected}")
        self.found = found
        self.expected = expected


class PoolLate(Exception):
    """The deadline passed; work that had not begun is never begun."""


class PoolHung(Exception):
    """A piece of work has had a thread of the pool for longer than any can take."""


class BoundedPool:
    """See the module. Used on one event loop.

    Args:
        name: Of its threads.
        threads: Pieces of work that run at once; one where they share something, as a tokenizer.
        hang_s: How long a piece may run before it counts as hung.
        hung: Called once with the name, on the event loop, when one does.
    """

    def __init__(
        self, name: str, threads: int, *, hang_s: float, hung: Callable[[str], None]
    ) -> None:
        self.waiting = 0  # pieces that somebody waits for, those at work with them
        self.waiting_bytes = 0
        self.is_hung = False
        self._name = name
        self._hang_s = hang_s
        self._on_hang = hung
        self._turn = asyncio.Semaphore(threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._limits: set[asyncio.Timeout] = set()

    @property
    def idle(self) -> bool:
        """Whether nothing waits, and a thread is free."""
        return not self.waiting and not self._turn.locked() and not self.is_hung

    async def run(
        self,
        work: Callable[[], T],
        *,
        deadline: float | None = None,
        most: int | None = None,
        size_bytes: int = 0,
        most_bytes: int | None = None,
    ) -> T:
        """Run one piece of work in its turn.

        Args:
            work: Called on a thread; its exceptions are passed on.
            deadline: When the answer is of no use any more, as ``time.monotonic()`` counts; None:
                whoever waits has time.
            most: How many may wait; None where it has to be done however many do.
            size_bytes: About what is held in memory for it until it is done.
            most_bytes: Of all that waits; one that is alone may have more.

        Raises:
            PoolFull: Come back later.
            PoolLate: The deadline passed.
            PoolHung: This piece, or one before it, never ends.
        """
        if self.is_hung:
            raise PoolHung
        if most is not None and self.waiting >= most:
            raise PoolFull(f"{self.waiting} requests wait for {self._name}", f"at most {most}")
        held = self.waiting_bytes
        if most_bytes is not None and held and held + size_bytes > most_bytes:
            raise PoolFull(
                f"{held} bytes wait for {self._name}, and {size_bytes} more to come",
                f"at most {most_bytes}",
            )
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise PoolLate
        limit = asyncio.timeout(left_s)
        self.waiting += 1
        self.waiting_bytes += size_bytes
        self._limits.add(limit)
        try:
            async with limit:
                await self._turn.acquire()
                loop = asyncio.get_running_loop()
                watch = loop.call_later(self._hang_s, self._hang)
                running = loop.run_in_executor(self._threads, work)

                def done(ended: asyncio.Future[T]) -> None:
                    # Not before the thread is free, even if nobody waits for this piece any more.
                    watch.cancel()
                    self._turn.release()
                    if not ended.cancelled():
                        ended.exception()  # passed on where somebody waits, else nobody's affair

                running.add_done_callback(done)
                return await asyncio.shield(running)
        except TimeoutError:
            if not limit.expired():  # the work's own
                raise
            raise (PoolHung if self.is_hung else PoolLate) from None
        finally:
            self._limits.discard(limit)
            self.waiting -= 1
            self.waiting_bytes -= size_bytes

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _hang(self) -> None:
        if self.is_hung:
            return
        self.is_hung = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if limit.when() is None or not limit.expired():
                limit.reschedule(now)
        self._on_hang(self._name)
