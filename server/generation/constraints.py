"""What grammars allow next: worked out beside the engine thread, which never waits for long.

A constraint belongs to one running request. After each step a thread takes in the tokens that were
chosen and works out which may follow, while the engine runs its next forward: for all requests in
one call of the library, which runs without Python's lock, because whoever asks for that lock in the
middle of a forward may wait as long as the forward takes. Where such a call took long, each of its
requests is worked out by itself for a while, and the one that takes long by a thread of low
priority, so that a grammar that is slow to follow is slow for its own request. What has been
compiled is kept, within a budget.
"""

from __future__ import annotations

import logging
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

from server.inputs.grammar_engine import Masks, Vocabulary
from server.messages import Failure, Grammar

logger = logging.getLogger(__name__)

FAST_THREADS: Final = 4
SLOW_THREADS: Final = 2
CORES_PER_THREAD: Final = 4  # of the machine, for each thread within the library
ROWS_TOGETHER: Final = 16  # constraints that are worked out in one call
SLOW_TOGETHER_S: Final = 0.01  # of such a call; one of them may be slow
SLOW_S: Final = 0.003  # of processor; a constraint that took more is worked out at low priority
SUSPECT_TOKENS: Final = 2  # after a slow call, each of its constraints is alone for so many
SLOW_TOKENS: Final = 8  # and one that was slow is so for so many, twice as many each time
MOST_SLOW_TOKENS: Final = 8192
_COMPILING_NICE: Final = 10
_SLOW_NICE: Final = 15  # a thirtieth of a core that others want
_NOTHING: Final = np.zeros(0, np.uint8)
# Measured over a thousand public schemas: what a compiled one takes, about.
KEPT_BYTES_EACH: Final = 64 << 10
KEPT_BYTES_PER_BYTE: Final = 64


class Matcher(Protocol):
    """What is asked of the library's matchers."""

    def deep_copy(self) -> Matcher: ...

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...

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
    """What may come next in one answer. Of the engine thread, but for what works it out.

    Args:
        begin: Makes the matcher.
        ends: Bits of the tokens that end the answer, and of the end itself, ``[bytes]``.
    """

    def __init__(self, begin: Callable[[], Matcher], ends: npt.NDArray[np.uint8]) -> None:
        self.begin = begin
        self.ends = ends
        self.matcher: Matcher | None = None  # of the thread that works it out
        self.late = False  # a step had to do without it
        self.closed = False  # nobody asks any more
        self.slow = False
        self.alone_tokens = 0  # so many more are worked out by themselves
        self._slow_tokens = SLOW_TOKENS
        self.work: MaskWork | None = None
        self.place = 0  # in the work

    @property
    def ready(self) -> bool:
        return self.work is not None and self.work.done

    def allowed(self) -> Allowed:
        """What may come next; waits until that is known."""
        assert self.work is not None
        return self.work.result()[self.place]

    def wait(self, until: float) -> bool:
        """Whether it is known by then, as ``time.monotonic()`` counts; notes where it is not."""
        if not self.ready:
            assert self.work is not None
            self.work.wait(until - time.monotonic())
        self.late = not self.ready
        return self.ready

    def close(self) -> None:
        """Nobody asks any more."""
        self.closed = True

    def took_alone(self, seconds: float) -> None:
        """Note what it took of a processor when it was worked out by itself."""
        self.slow = seconds > SLOW_S
        if self.slow:
            self.alone_tokens = self._slow_tokens
            self._slow_tokens = min(2 * self._slow_tokens, MOST_SLOW_TOKENS)
        elif self.alone_tokens:
            self.alone_tokens -= 1


class MaskWork:
    """Constraints that are worked out in one call, and what came of it.

    Args:
        rows: Each with the token that was chosen; None: it begins.
    """

    def __init__(self, rows: list[tuple[Constraint, int | None]]) -> None:
        self.rows = rows
        self.future: Future[list[Allowed]] | None = None  # None: not begun

    @property
    def done(self) -> bool:
        return self.future is not None and self.future.done()

    def result(self) -> list[Allowed]:
        """In the order of the rows; waits for it."""
        assert self.future is not None
        return self.future.result()

    def wait(self, timeout_s: float) -> None:
        """Return when it is done, or after so long."""
        assert self.future is not None
        with suppress(TimeoutError):
            self.future.exception(max(0.0, timeout_s))


class Constraints:
    """The constraints of a lane, and the threads that work for them.

    Args:
        vocabulary: Of the base.
        budget_bytes: Of grammars that are kept compiled.
    """

    def __init__(self, vocabulary: Vocabulary, budget_bytes: int) -> None:
        self._vocabulary = vocabulary
        self.kept = CompiledGrammars(vocabulary, budget_bytes)
        cores = len(os.sched_getaffinity(0))
        self._shared_masks = Masks(vocabulary, max(1, cores // CORES_PER_THREAD))
        self._own = threading.local()
        self._noted: list[MaskWork] = []  # what may follow is to be worked out
        self._fast = ThreadPoolExecutor(FAST_THREADS, thread_name_prefix="grammars")
        self._compiling = ThreadPoolExecutor(
            SLOW_THREADS,
            thread_name_prefix="grammars",
            initializer=partial(_give_way, _COMPILING_NICE),
        )
        self._slow = ThreadPoolExecutor(
            SLOW_THREADS, thread_name_prefix="slow-grammars", initializer=self._begin_slow
        )

    def begin(self, grammar: Grammar, ends: Collection[int]) -> Constraint:
        """The constraint of a request that is admitted; it is compiled from now on.

        Args:
            grammar: That was checked.
            ends: Tokens that end the answer: they may come where the text is complete.
        """
        size = self._vocabulary.size
        bits = np.zeros(-(-(size + 1) // 32) * 4, np.uint8)
        for at in (self._vocabulary.end, *(one for one in ends if 0 <= one < size)):
            bits[at >> 3] |= 1 << (at & 7)
        made = Constraint(partial(self.kept.matcher, grammar), bits)
        made.work = MaskWork([(made, None)])
        made.work.future = self._compiling.submit(self._work_out, made.work)
        return made

    def follow(self, constraint: Constraint, token_id: int) -> None:
        """Note a token that was chosen: ``start`` has worked out what may follow."""
        constraint.late = False
        last = self._noted[-1] if self._noted else None
        if (
            constraint.alone_tokens
            or last is None
            or len(last.rows) >= ROWS_TOGETHER
            or last.rows[0][0].alone_tokens
        ):
            last = MaskWork([])
            self._noted.append(last)
        constraint.work, constraint.place = last, len(last.rows)
        last.rows.append((constraint, token_id))

    def start(self) -> None:
        """Have worked out what may follow the tokens that were noted."""
        noted, self._noted = self._noted, []
        for work in noted:
            slow = work.rows[0][0].slow
            work.future = (self._slow if slow else self._fast).submit(self._work_out, work)

    def close(self) -> None:
        for pool in (self._fast, self._compiling, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin_slow(self) -> None:
        _give_way(_SLOW_NICE)
        self._own.masks = Masks(self._vocabulary, 1)

    def _work_out(self, work: MaskWork) -> list[Allowed]:
        """In a thread. Whatever happens in it is the end of these constraints only."""
        try:
            return self._taken_in(work.rows)
        except BaseException as error:  # the library's faults are no Exceptions
            logger.exception("What a grammar allows was not worked out")
            fault = ("grammar_too_complex", type(error).__name__)
            return [Allowed(_NOTHING, fault=fault) for _ in work.rows]

    def _taken_in(self, rows: list[tuple[Constraint, int | None]]) -> list[Allowed]:
        began = time.monotonic()
        (first, _), *others = rows
        if not others and first.closed:
            return [Allowed(_NOTHING, complete=True)]
        if first.matcher is None:
            first.matcher = first.begin()
        masks_of: Masks = getattr(self._own, "masks", self._shared_masks)
        matchers = [one.matcher for one, _ in rows if one.matcher is not None]
        assert len(matchers) == len(rows)
        told = [(one.matcher, token) for one, token in rows if token is not None]
        if told:
            masks_of.take(told)
        if others:
            masks = masks_of(matchers)
            if time.monotonic() - began > SLOW_TOGETHER_S:
                for one, _ in rows:
                    one.alone_tokens = SUSPECT_TOKENS
        else:
            began_here = time.thread_time()
            masks = np.frombuffer(matchers[0].compute_bitmask(), np.uint8)[None]
            first.took_alone(time.thread_time() - began_here)
        ends = np.stack([one.ends for one, _ in rows])
        return told_apart(masks, ends, matchers, self._vocabulary.end)


def told_apart(
    masks: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.uint8],
    matchers: Iterable[Matcher],
    end: int,
) -> list[Allowed]:
    """What masks say of each answer.

    Args:
        masks: ``[n, bytes]``, as matchers give them; left as they are.
        ends: ``[n, bytes]``, the tokens that end each answer, and ``end`` itself.
        matchers: n, for their errors.
        end: The id that says that a text is complete.
    """
    complete = (masks[:, end >> 3] >> (end & 7) & 1).astype(bool)
    going_on = masks & ~ends  # not even as text: it would end the answer
    some: npt.NDArray[np.bool_] = np.any(going_on, axis=1)
    going_on[complete] |= ends[complete]
    going_on[:, end >> 3] &= ~(1 << (end & 7)) & 0xFF
    told = []
    for at, matcher in enumerate(matchers):
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:120]
            code = "grammar_unreachable" if "NoExtension" in reason else "grammar_too_complex"
            told.append(Allowed(_NOTHING, fault=(code, reason)))
        elif some[at]:
            told.append(Allowed(going_on[at]))
        elif complete[at]:
            told.append(Allowed(_NOTHING, complete=True))
        else:
            found = ("grammar_unreachable", "no token that may come next")
            told.append(Allowed(_NOTHING, fault=found))
    return told


def wait_for_one(constraints: Iterable[Constraint], timeout_s: float) -> None:
    """Return when one of them is ready, or after so long."""
    works = {one.work for one in constraints}
    futures = [one.future for one in works if one is not None and one.future is not None]
    wait_for_any(futures, timeout_s, FIRST_COMPLETED)


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


def _give_way(nice: int) -> None:
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
