"""Open-loop load: requests leave when they are due, whether or not earlier ones were answered.

A closed loop slows down with the server and so never overloads it. Here arrivals are a Poisson
process, latency counts from the moment at which a request was due, and what the generator itself
could not send is told apart from what the server refused.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtests.connection import Connection, Lost, Reply

ENDING_S = 75.0  # for what is under way when the time is over: above the server's own deadline
YIELD_EVERY = 16  # arrivals that are sent before answers are looked at again
SLEEP_S = 0.001


@dataclass(frozen=True)
class Question:
    """One request, ready to send, and how to judge a 200 answer to it."""

    raw: bytes
    fault: Callable[[Reply], str | None]


@dataclass
class Outcome:
    """What one level of load came to."""

    rate_per_s: float
    seconds: float
    due: int = 0
    sent: int = 0
    without_connection: int = 0  # due while all connections were taken: the generator's limit
    good: int = 0  # answered 200 within the time
    late: int = 0  # answered 200 after it
    unanswered: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # of 200 answers, from when they were due
    refusal_latencies: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    own_cpu: float = 0.0  # of the generator, in cores

    @property
    def offered_per_s(self) -> float:
        return self.sent / self.seconds

    @property
    def goodput_per_s(self) -> float:
        return self.good / self.seconds


class Pool:
    """Connections to one server, opened as they are needed, up to ``most``."""

    def __init__(self, port: int, most: int) -> None:
        self.port, self.most = port, most
        self._idle: deque[Connection] = deque()
        self._opened = 0

    @property
    def is_spent(self) -> bool:
        return not self._idle and self._opened >= self.most

    async def take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            self._opened -= 1
        self._opened += 1
        try:
            return await Connection.open(self.port)
        except BaseException:
            self._opened -= 1
            raise

    def give(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            self._opened -= 1

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()
            self._opened -= 1


async def offer(
    pool: Pool, ask: Callable[[], Question], rate_per_s: float, seconds: float, seed: int
) -> Outcome:
    """Send at ``rate_per_s`` for ``seconds``; returns when all is answered or given up."""
    rng = random.Random(seed)
    outcome = Outcome(rate_per_s, seconds)
    tasks: set[asyncio.Task[None]] = set()
    answered: list[tuple[Question, Reply]] = []
    began, cpu = time.monotonic(), time.process_time()
    due = began + rng.expovariate(rate_per_s)
    while due < began + seconds:
        ahead = due - time.monotonic()
        if ahead > SLEEP_S:
            await asyncio.sleep(ahead)
        elif outcome.due % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        if time.monotonic() > began + seconds:
            break  # the generator fell behind: what is still due was never offered
        outcome.due += 1
        if pool.is_spent:
            outcome.without_connection += 1
        else:
            outcome.sent += 1
            one = _one(pool, ask(), (due, began + seconds), outcome, answered)
            task = asyncio.create_task(one)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        due += rng.expovariate(rate_per_s)
    outcome.own_cpu = (time.process_time() - cpu) / (time.monotonic() - began)
    outcome.due = max(outcome.due, round(rate_per_s * seconds * 0.98))
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=ENDING_S)
        outcome.unanswered = len(left)
        for task in left:
            task.cancel()
    # Judged when the load is over: it costs time that the generator does not have before.
    outcome.faults += [found for question, reply in answered if (found := question.fault(reply))]
    return outcome


async def _one(
    pool: Pool,
    question: Question,
    due_and_end: tuple[float, float],
    outcome: Outcome,
    answered: list[tuple[Question, Reply]],
) -> None:
    due, end = due_and_end
    try:
        connection = await pool.take()
    except (OSError, TimeoutError) as error:
        outcome.statuses[f"no connection: {type(error).__name__}"] += 1
        return
    try:
        reply = await connection.ask(question.raw)
    except Lost:
        outcome.statuses["connection lost"] += 1
        return
    finally:
        pool.give(connection)
    if reply.status == 200:
        outcome.statuses["200"] += 1
        outcome.good += reply.ended <= end
        outcome.late += reply.ended > end
        outcome.latencies.append(reply.ended - due)
        answered.append((question, reply))
        return
    outcome.statuses[reply.code()] += 1
    outcome.refusal_latencies.append(reply.ended - due)
    if reply.status == 429:
        told = reply.header("Retry-After")
        if told is None or not (told.isascii() and told.isdigit()):
            outcome.faults.append(f"429 with Retry-After {told!r}")
        else:
            outcome.retry_after_s.append(float(told))


async def capacity(
    port: int, ask: Callable[[], Question], crowds: tuple[int, ...], seconds: float
) -> dict[int, float]:
    """Answers per second of ever larger crowds, each of whom asks again when answered."""
    found: dict[int, float] = {}
    for crowd in crowds:
        connections = await asyncio.gather(*(Connection.open(port) for _ in range(crowd)))
        began = time.monotonic()
        end = began + seconds
        good = 0

        async def client(connection: Connection, end: float) -> None:
            nonlocal good
            while time.monotonic() < end:
                reply = await connection.ask(ask().raw)
                good += reply.status == 200 and reply.ended <= end

        await asyncio.gather(*(client(one, end) for one in connections))
        for one in connections:
            one.abort()
        found[crowd] = good / seconds
    return found
