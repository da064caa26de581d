"""Work that is too slow for the event loop, each kind on threads of its own: tokenizing with it.

Not asyncio's default threads: LitServe's response task lives there and must never wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeVar

from server.edge.admit.admission import Admission
from server.edge.admit.bounded_pool import BoundedPool, PoolFull, PoolHung, PoolLate
from server.errors import Refusal
from server.inputs.images import Images
from server.inputs.text import Text
from server.inputs.text_errors import TextError
from server.settings import Settings

T = TypeVar("T")
InputsT = TypeVar("InputsT", Text, Images)

AT_ONCE_CHARACTERS: Final = 4096  # texts longer than this are tokenized off the event loop
LONG_CHARACTERS: Final = 1 << 16  # and longer than this, by a tokenizer that nobody else waits for
INPUT_CHARACTERS: Final = 128  # what an input costs beside its text, in characters
# Threads of each kind of slow work: one kind at its limit stops no other.
Pool = Literal[
    "short-texts",
    "long-texts",
    "sources",
    "uploads",
    "registrations",
    "records",
    "collecting",
    "audit",
    "metrics",
    "bodies",
    "answers",
]
POOLS: Final[dict[Pool, int]] = {
    "short-texts": 1,  # a tokenizer keeps state
    "long-texts": 1,  # and so does its twin
    "sources": 4,  # fetching: as slow as where they come from
    "uploads": 2,
    "registrations": 2,
    "records": 2,
    "collecting": 1,
    "audit": 1,  # lines in the order of the calls
    "metrics": 1,
    "bodies": 1,  # large ones, from bytes to values
    "answers": 1,  # large ones, from values to bytes
}
# Kinds that are as slow as a disk, or as somebody else's server, and that few ask for.
UNHURRIED: Final[frozenset[Pool]] = frozenset(
    {"sources", "uploads", "registrations", "records", "collecting", "audit"}
)
UNHURRIED_WAITING: Final = 64  # requests that may wait for one of those
UNHURRIED_HANG_S: Final = 3600.0  # longer than any source or disk takes for one adapter


class SlowWork:
    """See the module. Made before the fork, opened on the event loop that uses it.

    Args:
        settings: Replaced when they are read again.
        admission: Says when to come back.
        hung: As `BoundedPool` has it.
    """

    def __init__(
        self, settings: Settings, admission: Admission, hung: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.admission = admission
        self._hung = hung
        self._pools: dict[Pool, BoundedPool] = {}

    def open(self) -> None:
        """Make the threads for slow work; on the event loop, once in a process."""
        self._pools = {
            name: BoundedPool(name, count, hang_s=self._hang_s(name), hung=self._hung)
            for name, count in POOLS.items()
        }

    def _hang_s(self, pool: Pool) -> float:
        """How long a piece of work may have a thread before this process is given up for it."""
        if pool in UNHURRIED:
            return UNHURRIED_HANG_S
        return self.settings.max_step_s if pool == "long-texts" else self.settings.hang_s

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    async def run(
        self,
        work: Callable[[], T],
        pool: Pool,
        *,
        size_bytes: int = 0,
        deadline: float | None = None,
        owed: bool = False,
    ) -> T:
        """Run something slow off the event loop, on the threads of its kind.

        Args:
            work: Its exceptions are passed on.
            pool: The kind.
            size_bytes: About what is held in memory for it.
            deadline: As ``time.monotonic()`` counts; without one, ``timeout_s`` from now for what
                answers depend on, and none for the rest.
            owed: It has to be done, however much waits: the end of what was begun.

        Raises:
            Refusal: overloaded, deadline_exceeded, or restarting where a piece of work hangs.
        """
        settings = self.settings
        most = max(1, settings.max_queue_requests // settings.api_processes)
        if pool in UNHURRIED:
            most = min(most, UNHURRIED_WAITING)
        elif deadline is None and not owed:
            deadline = time.monotonic() + settings.timeout_s
        prepared = "the request could be prepared, or its answer written"
        with pool_refusals(self.admission, prepared, "a request"):
            return await self._pools[pool].run(
                work,
                deadline=deadline,
                most=None if owed else most,
                size_bytes=size_bytes,
                most_bytes=None if owed else int(settings.max_pending_body_bytes),
            )

    async def tokenize(
        self,
        inputs: InputsT,
        characters: int,
        work: Callable[[InputsT], T],
        field: str,
        deadline: float,
    ) -> T:
        """Run the tokenizer: at once for short texts, off the event loop for others; for long ones
        a tokenizer and a thread of their own, so that short ones never wait for them.

        Args:
            inputs: The tokenizer, or the image processor.
            characters: How long the texts are in all, with ``INPUT_CHARACTERS`` for each.
            work: What to run, with ``inputs`` or its twin.
            field: Where the body has the texts, for an error.
            deadline: Of the request, as ``time.monotonic()`` counts.

        Raises:
            Refusal: In the tokenizer's words; or as `run`.
        """
        short = self._pools["short-texts"]
        try:
            # While its thread is at work it has the tokenizer: the event loop must not wait for it.
            if characters <= AT_ONCE_CHARACTERS and short.idle:
                return work(inputs)
            if characters <= LONG_CHARACTERS:
                return await self.run(
                    lambda: work(inputs), "short-texts", size_bytes=characters, deadline=deadline
                )
            return await self.run(
                lambda: work(inputs.apart), "long-texts", size_bytes=characters, deadline=deadline
            )
        except TextError as error:
            raise Refusal.of(error, field) from None


@contextmanager
def pool_refusals(admission: Admission, done: str, subject: str) -> Iterator[None]:
    """What a pool that is full, late or hung comes to for a client.

    Args:
        admission: Says when to come back.
        done: What did not happen before the deadline.
        subject: What is worked on.

    Raises:
        Refusal: overloaded, deadline_exceeded or restarting.
    """
    try:
        yield
    except PoolFull as full:
        raise admission.overloaded(full.found, full.expected) from None
    except PoolLate:
        raise Refusal.because(
            "deadline_exceeded",
            f"The deadline passed before {done}.",
            fix="Ask for less, allow more time, or send fewer requests at once.",
        ) from None
    except PoolHung:
        raise Refusal.because(
            "restarting",
            f"Work on {subject} has hung, and its HTTP process ends.",
            fix="Send the request again; a new process is being started.",
        ) from None
