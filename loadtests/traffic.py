"""Steady checked traffic of every kind, for tests that break or watch a server meanwhile.

A crowd of clients asks again when answered: classification, generation, streams, and clients that
leave in mid-stream. Every answer is compared with what its adapter answered alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from loadtests.connection import Connection, Lost, Reply, encoded
from loadtests.stage import PROMPTS, TEXTS, Adapter, Stage

HUNG_S: Final = 30.0  # an answer that takes longer never comes
PAUSE_S: Final = 0.05
RETRY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Ended:
    """One request that came to an end."""

    kind: str
    began: float  # monotonic
    ended: float
    outcome: str  # "ok", "wrong", "left", or the error's status and code


@dataclass
class Log:
    """What all clients saw."""

    ended: list[Ended] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    running: dict[int, tuple[str, float]] = field(default_factory=dict)  # by client
    keep: bool = True  # every request, or only counts
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, client: int, outcome: str) -> None:
        kind, began = self.running.pop(client)
        self.counts[kind, outcome] += 1
        if self.keep:
            self.ended.append(Ended(kind, began, time.monotonic(), outcome))

    def errors(self) -> dict[str, int]:
        """How often what happened that is neither a right answer nor a client that left."""
        return {
            f"{kind}: {outcome}": count
            for (kind, outcome), count in sorted(self.counts.items())
            if outcome not in {"ok", "left"}
        }

    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Crowd:
    """How many clients of each kind."""

    predict: int = 6
    generate: int = 3
    stream: int = 3
    leave: int = 1

    def kinds(self) -> list[str]:
        return [kind for kind, count in vars(self).items() for _ in range(count)]


class Traffic:
    """A crowd at work; `run` returns when ``over`` is set and all have stopped."""

    def __init__(self, port: int, stage: Stage, crowd: Crowd, seed: int, log: Log) -> None:
        self.port, self.stage, self.crowd, self.seed, self.log = port, stage, crowd, seed, log
        self.over = asyncio.Event()

    async def run(self) -> None:
        await asyncio.gather(
            *(self._client(number, kind) for number, kind in enumerate(self.crowd.kinds()))
        )

    async def _client(self, number: int, kind: str) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        ask: Callable[[int, Connection, random.Random], Awaitable[str]] = {
            "predict": self._predict,
            "generate": self._generate,
            "stream": self._stream,
            "leave": self._leave,
        }[kind]
        connection: Connection | None = None
        while not self.over.is_set():
            self.log.running[number] = (kind, time.monotonic())
            try:
                if connection is None or not connection.usable:
                    connection = await Connection.open(self.port)
                outcome = await ask(number, connection, rng)
            except TimeoutError:
                self.log.hung.append(f"{kind}: no answer within {HUNG_S:g} s")
                outcome = "hung"
            except Lost as error:
                outcome = f"connection {error}"
            except OSError as error:
                outcome = f"no connection: {type(error).__name__}"
            self.log.note(number, outcome)
            await asyncio.sleep(PAUSE_S * rng.random() if outcome in {"ok", "left"} else RETRY_S)
        if connection is not None:
            connection.abort()

    async def _predict(self, _: int, connection: Connection, rng: random.Random) -> str:
        adapter = self.stage.pick(self.stage.classifiers, rng)
        texts = rng.sample(TEXTS, rng.choice((1, 1, 3)))
        raw = encoded(f"/predict?adapter={adapter.name}", {"inputs": texts})
        reply = await _asked(connection, raw)
        if reply.status != 200:
            return reply.code()
        faults = (
            self.stage.fault_in_scores(adapter, text, answer)
            for text, answer in zip(texts, reply.json(), strict=True)
        )
        return self._judged(adapter, reply, next((one for one in faults if one), None))

    async def _generate(self, _: int, connection: Connection, rng: random.Random) -> str:
        adapter, prompt, body = self._prompt(rng)
        reply = await _asked(connection, encoded(f"/generate?adapter={adapter.name}", body))
        if reply.status != 200:
            return reply.code()
        text = reply.json()["generated_text"]
        return self._judged(adapter, reply, self.stage.fault_in_text(adapter, prompt, text, 1))

    async def _stream(self, _: int, connection: Connection, rng: random.Random) -> str:
        adapter, prompt, body = self._prompt(rng)
        reply = await _asked(connection, encoded(f"/generate_stream?adapter={adapter.name}", body))
        if reply.status != 200:
            return reply.code()
        last = last_event(reply.body)
        if "code" in last:
            return f"event {last['code']}"
        text = last.get("generated_text")
        if not isinstance(text, str):
            return self._judged(adapter, reply, f"no last event: {reply.body[-200:]!r}")
        tokens = reply.body.count(b'"token":')
        return self._judged(adapter, reply, self.stage.fault_in_text(adapter, prompt, text, tokens))

    async def _leave(self, _: int, connection: Connection, rng: random.Random) -> str:
        """Go away after the first piece of a stream."""
        adapter, _prompt, body = self._prompt(rng)
        raw = encoded(f"/generate_stream?adapter={adapter.name}", body)
        began = asyncio.Event()
        asked = asyncio.ensure_future(connection.ask(raw, lambda _: began.set()))
        came = asyncio.ensure_future(began.wait())
        try:
            async with asyncio.timeout(HUNG_S):
                await asyncio.wait({asked, came}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and asked.exception() is None and asked.result().status != 200:
                return asked.result().code()
            if asked.done() and (error := asked.exception()) is not None:
                raise error
            return "left"
        finally:
            for one in (asked, came):
                one.cancel()
            await asyncio.gather(asked, came, return_exceptions=True)
            connection.abort()

    def _prompt(self, rng: random.Random) -> tuple[Adapter, str, dict[str, object]]:
        adapter = self.stage.pick(self.stage.generators, rng)
        prompt = rng.choice(PROMPTS)
        parameters = {"max_new_tokens": self.stage.new_tokens}
        return adapter, prompt, {"inputs": prompt, "parameters": parameters}

    def _judged(self, adapter: Adapter, reply: Reply, fault: str | None) -> str:
        named = (reply.header("X-Adapter"), reply.header("X-Adapter-Version"))
        if named != (adapter.name, adapter.version):
            fault = f"answered by {named}"
        if fault is None:
            return "ok"
        self.log.wrong.append(f"{adapter.name}: {fault}")
        return "wrong"


async def _asked(connection: Connection, raw: bytes) -> Reply:
    async with asyncio.timeout(HUNG_S):
        return await connection.ask(raw)


def last_event(body: bytes) -> dict[str, object]:
    """The last server-sent event of a stream; empty when there is none."""
    lines = [line for line in body.split(b"\n") if line.startswith(b"data:")]
    if not lines:
        return {}
    try:
        found = json.loads(lines[-1].removeprefix(b"data:"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def percentile(values: Sequence[float], part: float) -> float:
    """By nearest rank; NaN of nothing."""
    ordered = sorted(values) or [float("nan")]
    return ordered[round(part * (len(ordered) - 1))]
