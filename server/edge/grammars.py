"""Grammars checked off the event loop, before their requests are admitted.

Each HTTP process has a few processes that check (``server.inputs.grammars``), started when they
are first needed. What was found of a grammar is remembered, its refusal too, and requests that come
with one grammar at the same time wait for one check.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Final

from server.edge.admit.bounded_pool import BoundedPool
from server.inputs.grammars import (
    GrammarLimits,
    GrammarProcess,
    GrammarRefused,
    GrammarTooComplex,
)
from server.inputs.text_errors import InputTooSlow
from server.messages import Grammar

CHECKERS: Final = 2
REMEMBERED_BYTES: Final = 16 << 20
REMEMBERED_EACH: Final = 512  # what an entry takes beside its text, about


class Grammars:
    """See the module. Made on the event loop that uses it.

    Args:
        tokens: Says what each id of the base adds to a text; asked in a thread.
        limits: Of one grammar.
        hang_s: How long a check may take before the process is given up for it.
        hung: Called with the name of the threads when one does.
    """

    def __init__(
        self,
        tokens: Callable[[], Sequence[bytes]],
        limits: GrammarLimits,
        *,
        hang_s: float,
        hung: Callable[[str], None],
    ) -> None:
        self.limits = limits
        self._free = [GrammarProcess(tokens, limits) for _ in range(CHECKERS)]
        self._all = tuple(self._free)
        self._pool = BoundedPool("grammars", CHECKERS, hang_s=hang_s, hung=hung)
        self._known: OrderedDict[str, Grammar | GrammarRefused] = OrderedDict()
        self._known_bytes = 0
        self._under_way: dict[str, asyncio.Event] = {}  # set when a check has ended

    async def check(self, kind: str, content: Any, *, deadline: float, most: int) -> Grammar:
        """A grammar as the worker takes it.

        Args:
            kind: ``json_schema``, ``regex``, ``choice``, ``lark`` or ``tool_calls``.
            content: As ``GrammarProcess.check`` takes it.
            deadline: As ``time.monotonic()`` counts.
            most: How many grammars may wait.

        Raises:
            GrammarRefused: It cannot be honoured.
            InputTooSlow, PoolLate: The deadline passed.
            PoolFull: Come back later.
            PoolHung: A check never ends.
        """
        try:
            raw = json.dumps([kind, content]).encode()
        except RecursionError:
            raise GrammarTooComplex(
                "The grammar is nested too deeply.", expected="less nesting"
            ) from None
        if len(raw) > self.limits.text_bytes:
            raise GrammarTooComplex(
                "The grammar is too large.",
                found=f"{len(raw)} bytes",
                expected=f"at most {self.limits.text_bytes} bytes",
                fix="Make it smaller, or ask the operator to raise max_grammar_bytes.",
            )
        key = hashlib.sha256(raw).hexdigest()
        while (found := self._known.get(key)) is None and key in self._under_way:
            await self._ended(self._under_way[key], deadline)
        if found is None:
            ended = self._under_way[key] = asyncio.Event()
            try:
                found = await self._pool.run(
                    lambda: self._work(kind, content, deadline),
                    deadline=deadline,
                    most=most,
                    size_bytes=len(raw),
                )
                self._remember(key, found)
            finally:
                del self._under_way[key]
                ended.set()
        else:
            self._known.move_to_end(key)
        if isinstance(found, GrammarRefused):
            # Not the one that is kept: each time it is raised it would keep the frames it passes.
            raise copy(found)
        return found

    @staticmethod
    async def _ended(check: asyncio.Event, deadline: float) -> None:
        """Wait for a check that another request has asked for, however it ends."""
        try:
            await asyncio.wait_for(check.wait(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise InputTooSlow(
                "The deadline passed while the grammar was checked.",
                fix="Send a smaller grammar, or allow more time.",
            ) from None

    def close(self) -> None:
        self._pool.close()
        for one in self._all:
            if one in self._free:  # those at work end with the process, as their pipes do
                one.close()

    def _work(self, kind: str, content: Any, deadline: float) -> Grammar | GrammarRefused:
        process = self._free.pop()  # there is one for each thread
        try:
            return process.check(kind, content, deadline=deadline)
        except GrammarRefused as refused:
            return refused.with_traceback(None)
        finally:
            self._free.append(process)

    def _remember(self, key: str, found: Grammar | GrammarRefused) -> None:
        if key in self._known:
            return
        self._known[key] = found
        self._known_bytes += _size(found)
        while self._known_bytes > REMEMBERED_BYTES and len(self._known) > 1:
            _, old = self._known.popitem(last=False)
            self._known_bytes -= _size(old)


def _size(found: Grammar | GrammarRefused) -> int:
    return REMEMBERED_EACH + (len(found.text) if isinstance(found, Grammar) else 0)
