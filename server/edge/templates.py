"""Conversations written out off the event loop, so that no template holds up anybody else.

Each HTTP process has a few render processes. A template has a turn at a time for short and one for
long conversations: one that takes all the time that it may makes only its own users wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from adapters.intake.conversation import Conversation
from server.edge.admit.bounded_pool import PoolFull, PoolLate
from server.inputs.rendering import ChatTemplate, RenderLimits, RenderProcess

PROCESSES: Final = 3
LONG_CHAT_CHARACTERS: Final = 1 << 16
KEPT_BYTES: Final = 8 << 20  # of templates read from the store


class Templates:
    """See the module. Made on the event loop that uses it.

    Args:
        limits: Of one conversation.
        read: What the store has of a version; called in a thread.
    """

    def __init__(self, limits: RenderLimits, read: Callable[[str], Conversation]) -> None:
        self.waiting = 0
        self._read = read
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="templates")
        # Two: one may wait for an object store that is away, and what is on this disk is read yet.
        self._reader = ThreadPoolExecutor(2, thread_name_prefix="template-files")
        self._free = [RenderProcess(limits) for _ in range(PROCESSES)]
        self._all = tuple(self._free)
        self._places = asyncio.Semaphore(PROCESSES)
        self._turns: dict[tuple[str, bool], tuple[asyncio.Lock, list[None]]] = {}
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._kept_bytes = 0

    async def conversation(self, version: str) -> Conversation:
        """What a version brought, from memory or from the store.

        Raises:
            AdapterNotFound, CorruptFile: As ``Store.conversation``.
        """
        found = self._kept.get(version)
        if found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._reader, self._read, version)
            if version not in self._kept:
                self._kept_bytes += len(found.kept())
            self._kept[version] = found
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._kept_bytes -= len(old.kept())
        self._kept.move_to_end(version)
        return found

    async def render(
        self,
        key: str,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        characters: int,
        *,
        deadline: float,
        most: int,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """One conversation as a prompt.

        Args:
            key: Whose turn it is: a version, or "" for the base.
            template: The template.
            messages: As templates take them.
            characters: How long they are in all, about.
            deadline: As ``time.monotonic()`` counts.
            most: How many conversations may wait.
            tools, variables: As ``RenderProcess.render`` takes them.

        Raises:
            PoolFull: Come back later.
            PoolLate: The deadline passed before its turn came.
            TextError: As ``RenderProcess.render``.
        """
        if self.waiting >= most:
            waiting = f"{self.waiting} conversations wait to be rendered"
            raise PoolFull(waiting, f"at most {most}")
        if deadline <= time.monotonic():
            raise PoolLate
        turn = (key, characters > LONG_CHAT_CHARACTERS)
        lock, users = self._turns.setdefault(turn, (asyncio.Lock(), []))
        users.append(None)
        self.waiting += 1
        try:
            await self._take(lock, deadline)
            running = asyncio.get_running_loop().run_in_executor(
                self._threads,
                partial(self._work, template, messages, deadline, tools, variables),
            )

            def done(future: asyncio.Future[str]) -> None:
                # Not before the thread is free, even if nobody waits for this piece any more.
                self._places.release()
                lock.release()
                self._forget(turn)
                if not future.cancelled():
                    future.exception()  # it is passed on where somebody waits

            running.add_done_callback(done)
            return await asyncio.shield(running)
        finally:
            self.waiting -= 1
            users.pop()
            self._forget(turn)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=False, cancel_futures=True)
        for one in self._all:
            if one in self._free:  # those at work end with the process, as their pipes do
                one.close()

    async def _take(self, lock: asyncio.Lock, deadline: float) -> None:
        """A turn, and then a place."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await lock.acquire()
                try:
                    await self._places.acquire()
                except BaseException:
                    lock.release()
                    raise
        except TimeoutError:
            raise PoolLate from None

    def _forget(self, turn: tuple[str, bool]) -> None:
        """Nobody has this turn or waits for it."""
        lock, users = self._turns.get(turn, (None, ()))
        if lock is not None and not users and not lock.locked():
            del self._turns[turn]

    def _work(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        deadline: float,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
    ) -> str:
        process = self._free.pop()  # there is one for each thread
        try:
            return process.render(
                template, messages, tools=tools, variables=variables, deadline=deadline
            )
        finally:
            self._free.append(process)
