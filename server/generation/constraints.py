"""What grammars allow next: worked out beside the engine thread, which never waits for long.

A constraint belongs to one running request. After each token it is told, a thread takes the token
in and works out which may follow, while the engine runs its next forward: the library does that
without Python's lock. What takes long is done by threads of low priority, so that a grammar that is
slow to follow is slow for its own request. What has been compiled is kept, within a budget.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from server.inputs.grammar_engine import Vocabulary
from server.messages import Failure, Grammar

FAST_THREADS: Final = 4
SLOW_THREADS: Final = 2
SLOW_S: Final = 0.003  # a constraint that took longer than this is worked out at low priority
_SLOW_NICE: Final = 10
# Measured over a thousand public schemas: what a compiled one takes, about.
KEPT_BYTES_EACH: Final = 64 << 10
KEPT_BYTES_PER_BYTE: Final = 64


class Matcher(Protocol):
    """What is asked of the library's matchers."""

    def deep_copy(self) -> Matcher: ...

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...

    def is_accepting(self) -> bool: ...

    def consume_token(self, sampled_token: int) -> bool: ...

    def compute_bitmask(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may come next.

    Args:
        bits: One for each id, the lowest of a byte first.
        complete: The text fits and nothing can be added to it: the answer is over.
        fault: Why nothing can come, and nothing is complete.
    """

    bits: npt.NDArray[np.uint8]
    complete: bool = False
    fault: tuple[str, str] | None = None  # a code and what was found

    @property
    def over(self) -> bool:
        """Whether no token comes any more."""
        return self.complete or self.fault is not None


class CompiledGrammars:
    """Matchers at the start of an answer, by the digest of their grammar; the oldest leave first.

    Args:
        vocabulary: Of the base.
        budget_bytes: Of all that is kept, as ``KEPT_BYTES_EACH`` reckons. One that is alone may
            have more.
    """

    def __init__(self, vocabulary: Vocabulary, budget_bytes: int) -> None:
        self._vocabulary = vocabulary
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[str, tuple[Matcher, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.held_bytes = 0
        self.compiled = 0

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher of one's own, at the start of an answer; from any thread."""
        with self._lock:
            found = self._kept.get(grammar.digest)
            if found is not None:
                self._kept.move_to_end(grammar.digest)
                return found[0].deep_copy()
        made: Any = self._vocabulary.matcher(grammar.text)
        size = KEPT_BYTES_EACH + KEPT_BYTES_PER_BYTE * len(grammar.text)
        with self._lock:
            self.compiled += 1
            if grammar.digest not in self._kept:
                self._kept[grammar.digest] = (made, size)
                self.held_bytes += size
            while self.held_bytes > self._budget_bytes and len(self._kept) > 1:
                _, (_, freed) = self._kept.popitem(last=False)
                self.held_bytes -= freed
            own: Matcher = made.deep_copy()
        return own


class Constraint:
    """What may come next in one answer. Of the engine thread, but for its work.

    Args:
        begin: Makes the matcher.
        ends: Tokens that end the answer; none where the request ignores them.
        vocabulary: Of the base.
        pools: Threads for what is fast and for what is slow.
    """

    def __init__(
        self,
        begin: Callable[[], Matcher],
        ends: Collection[int],
        vocabulary: Vocabulary,
        pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
    ) -> None:
        self._ends = tuple(one for one in ends if 0 <= one < vocabulary.size)
        self._vocabulary = vocabulary
        self._fast, self._slow = pools
        self._matcher: Matcher | None = None
        self._took_s = 0.0
        self.late = False  # a step had to do without it
        self.work: Future[Allowed] = self._slow.submit(self._begin, begin)

    @property
    def ready(self) -> bool:
        return self.work.done()

    def allowed(self) -> Allowed:
        """What may come next; waits until that is known."""
        return self.work.result()

    def wait(self, until: float) -> bool:
        """Whether it is known by then, as ``time.monotonic()`` counts; notes where it is not."""
        if not self.ready:
            with suppress(TimeoutError):
                self.work.exception(max(0.0, until - time.monotonic()))
        self.late = not self.ready
        return self.ready

    def advance(self, token_id: int) -> None:
        """Take in the token that was chosen, and work out what may follow it."""
        pool = self._slow if self._took_s > SLOW_S else self._fast
        self.late = False
        self.work = pool.submit(self._follow, token_id)

    def close(self) -> None:
        """Nobody asks any more."""
        self.work.cancel()

    def _begin(self, begin: Callable[[], Matcher]) -> Allowed:
        self._matcher = begin()
        return self._next()

    def _follow(self, token_id: int) -> Allowed:
        began = time.monotonic()
        assert self._matcher is not None
        try:
            self._matcher.consume_token(token_id)
            return self._next()
        finally:
            self._took_s = time.monotonic() - began

    def _next(self) -> Allowed:
        matcher = self._matcher
        assert matcher is not None
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        empty = np.zeros(0, np.uint8)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:120]
            stuck = "NoExtension" in reason
            return Allowed(
                empty, fault=("grammar_unreachable" if stuck else "grammar_too_complex", reason)
            )
        bits = np.frombuffer(mask, np.uint8).copy()
        complete = bool(_bit(bits, self._vocabulary.end))
        _set(bits, (self._vocabulary.end,), on=False)
        _set(bits, self._ends, on=False)  # not even as text: it would end the answer
        if not bits.any():
            if complete:
                return Allowed(bits, complete=True)
            return Allowed(bits, fault=("grammar_unreachable", "no token that may come next"))
        if complete:
            _set(bits, self._ends, on=True)
        return Allowed(bits)


class Constraints:
    """The constraints of a lane, and the threads that work for them.

    Args:
        vocabulary: Of the base.
        budget_bytes: Of grammars that are kept compiled.
    """

    def __init__(self, vocabulary: Vocabulary, budget_bytes: int) -> None:
        self._vocabulary = vocabulary
        self.kept = CompiledGrammars(vocabulary, budget_bytes)
        self._pools = (
            ThreadPoolExecutor(FAST_THREADS, thread_name_prefix="grammars"),
            ThreadPoolExecutor(
                SLOW_THREADS, thread_name_prefix="slow-grammars", initializer=_give_way
            ),
        )

    def begin(self, grammar: Grammar, ends: Collection[int]) -> Constraint:
        """The constraint of a request that is admitted; it is compiled from now on.

        Args:
            grammar: That was checked.
            ends: Tokens that end the answer: they may come where the text is complete.
        """
        return Constraint(
            partial(self.kept.matcher, grammar),
            ends,
            self._vocabulary,
            self._pools,
        )

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)


def wait_for_one(constraints: Iterable[Constraint], timeout_s: float) -> None:
    """Return when one of them is ready, or after so long."""
    wait_for_any([one.work for one in constraints], timeout_s, FIRST_COMPLETED)


def constraint_failure(request_id: str, code: str, found: str) -> Failure:
    """The end of a request whose grammar cannot go on."""
    stuck = code == "grammar_unreachable"
    return Failure(
        request_id,
        code,
        "The answer cannot go on within its grammar."
        if stuck
        else "The grammar takes too much to follow.",
        found=found,
        expected="a grammar that the base's vocabulary can write"
        if stuck
        else "a grammar that is followed within the engine's limits",
        fix="Make the grammar simpler: fewer alternatives, and patterns that end.",
    )


def _give_way() -> None:
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SLOW_NICE)


def _bit(bits: npt.NDArray[np.uint8], at: int) -> int:
    return int(bits[at >> 3]) >> (at & 7) & 1


def _set(bits: npt.NDArray[np.uint8], ids: Iterable[int], *, on: bool) -> None:
    for at in ids:
        if on:
            bits[at >> 3] |= 1 << (at & 7)
        else:
            bits[at >> 3] &= ~(1 << (at & 7)) & 0xFF
