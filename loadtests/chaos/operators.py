"""An operator who registers, replaces, asks and removes, and keeps books of what was acknowledged.

A change that was refused has not happened; one whose answer never came may have happened or not,
and only then are two states allowed. Whatever is asked must be answered by an allowed version, with
that version's scores.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loadtests.chaos.windows import Windows
from loadtests.connection import Connection, Lost, Reply, encoded
from loadtests.stage import TEXTS

BOUNDARY: Final = "hira-chaos-boundary"
ASK_S: Final = 60.0
TURN_S: Final = 0.4
# Answers that say for certain that nothing was changed.
REFUSED: Final = frozenset({400, 401, 403, 404, 409, 413, 415, 422, 429, 503, 507})


@dataclass(frozen=True)
class Content:
    """One adapter to upload, and what it must answer."""

    tar: bytes
    version: str
    scores: Mapping[str, Mapping[str, float]]  # by text, by label


@dataclass
class Books:
    """What one operator knows of its names.

    Args:
        allowed: By name, the versions that may answer now; None among them: not registered.
    """

    allowed: dict[str, set[str | None]]
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # failures that no break excuses


class Operator:
    """One operator at work on names of its own.

    Args:
        port: Of the server.
        admin: Headers with its key.
        names: That nobody else touches.
        contents: Take turns under the names.
        tolerance: By how much a score may be off.
    """

    def __init__(
        self,
        port: int,
        admin: Mapping[str, str],
        names: Sequence[str],
        *,
        contents: Sequence[Content],
        tolerance: float,
        windows: Windows,
        seed: str,
    ) -> None:
        self.port, self.admin, self.windows = port, admin, windows
        self.contents = {one.version: one for one in contents}
        self.tolerance = tolerance
        self.rng = random.Random(seed)
        self.books = Books({name: {None} for name in names})
        self._connection: Connection | None = None

    async def run(self, over: asyncio.Event) -> None:
        """Take turns until ``over`` is set."""
        while not over.is_set():
            name = self.rng.choice(list(self.books.allowed))
            turn = self.rng.choices((self._put, self._ask, self._remove), (3, 6, 1))[0]
            began = time.monotonic()
            try:
                fault = await turn(name)
            except TimeoutError:
                self.books.hung.append(f"{turn.__name__} {name}: no answer within {ASK_S:g} s")
                fault = None
            except (Lost, OSError) as error:
                fault = f"{type(error).__name__} {error}"
            if fault is not None:
                excuse = self.windows.cover(began, time.monotonic())
                self.books.done[f"refused during {excuse}" if excuse else "failed"] += 1
                if excuse is None:
                    self.books.failed.append(f"{turn.__name__.strip('_')} {name}: {fault}")
            await asyncio.sleep(TURN_S * self.rng.random())
        if self._connection is not None:
            self._connection.abort()

    async def check(self) -> None:
        """At the end, when all is well again: every acknowledged change is there."""
        for name, allowed in self.books.allowed.items():
            for _ in range(3):
                try:
                    fault = await self._ask(name)
                    break
                except (Lost, OSError, TimeoutError) as error:
                    fault = f"{type(error).__name__} {error}"
            if fault is not None:
                self.books.lost.append(f"{name}, allowed {sorted(map(str, allowed))}: {fault}")

    async def _put(self, name: str) -> str | None:
        content = self.rng.choice(list(self.contents.values()))
        before = set(self.books.allowed[name])
        self.books.allowed[name] = before | {content.version}  # from now on it may have happened
        reply = await self._reply(upload(name, content.tar, self.admin))
        if reply.status in {200, 201}:
            self.books.allowed[name] = {content.version}
            self.books.done["registered"] += 1
            return None
        if reply.status in REFUSED:
            self.books.allowed[name] = before
        return reply.code()

    async def _remove(self, name: str) -> str | None:
        before = set(self.books.allowed[name])
        self.books.allowed[name] = before | {None}
        raw = encoded(f"/admin/adapters/{name}", method="DELETE", headers=self.admin)
        reply = await self._reply(raw)
        if reply.status == 204 or (reply.status == 404 and None in before):
            self.books.allowed[name] = {None}
            self.books.done["removed"] += 1
            return None
        if reply.status == 404:
            self.books.lost.append(f"{name}: not there, allowed {sorted(map(str, before))}")
            self.books.allowed[name] = {None}
            return None
        if reply.status in REFUSED:
            self.books.allowed[name] = before
        return reply.code()

    async def _ask(self, name: str) -> str | None:
        allowed, text = self.books.allowed[name], self.rng.choice(TEXTS)
        reply = await self._reply(encoded(f"/predict?adapter={name}", {"inputs": text}))
        if reply.status == 404 and None in allowed:
            self.books.done["not there, rightly"] += 1
            return None
        if reply.status == 404:
            self.books.lost.append(f"{name}: 404, allowed {sorted(map(str, allowed))}")
            return None
        if reply.status != 200:
            return reply.code()
        version = reply.header("X-Adapter-Version")
        if version not in allowed:
            self.books.wrong.append(
                f"{name}: answered by {version}, allowed {sorted(map(str, allowed))}"
            )
            return None
        self.books.allowed[name] = {version}  # what was uncertain is known now
        fault = fault_in(reply, self.contents[str(version)], text, self.tolerance)
        if fault is not None:
            self.books.wrong.append(f"{name}: {fault}")
        self.books.done["asked"] += 1
        return None

    async def _reply(self, raw: bytes) -> Reply:
        if self._connection is None or not self._connection.usable:
            self._connection = await Connection.open(self.port)
        async with asyncio.timeout(ASK_S):
            return await self._connection.ask(raw)


def fault_in(reply: Reply, content: Content, text: str, tolerance: float) -> str | None:
    """None, or how an answer differs from the one that its version gave alone."""
    found = {row["label"]: row["score"] for row in reply.json()}
    expected = content.scores[text]
    if found.keys() != expected.keys():
        return f"labels {sorted(found)} in place of {sorted(expected)}"
    worst = max(abs(found[label] - expected[label]) for label in expected)
    if not worst <= tolerance:  # also true for NaN
        return f"version {content.version}: a score is off by {worst:.3g} (allowed {tolerance:g})"
    return None


def upload(name: str, tar: bytes, admin: Mapping[str, str]) -> bytes:
    """A registration that replaces, as bytes to send."""
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    fields = f'{part}"name"\r\n\r\n{name}\r\n{part}"replace"\r\n\r\ntrue\r\n'
    opening = f'{part}"file"; filename="{name}.tar"\r\nContent-Type: application/x-tar\r\n\r\n'
    body = fields.encode() + opening.encode() + tar + f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return encoded("/admin/adapters", body, headers={**admin, **kind})


async def learn(
    port: int, admin: Mapping[str, str], name: str, tars: Sequence[bytes]
) -> list[Content]:
    """What each upload answers, alone, before any traffic.

    Args:
        name: Used for it, and removed again.
    """
    connection = await Connection.open(port)
    found = []
    for tar in tars:
        reply = await connection.ask(upload(name, tar, admin))
        if reply.status not in {200, 201}:
            raise SystemExit(f"an adapter for the test was refused: {reply.body[:300]!r}")
        version = str(reply.json()["version"])
        scores = {}
        for text in TEXTS:
            answer = await connection.ask(encoded(f"/predict?adapter={name}", {"inputs": text}))
            if answer.status != 200:
                raise SystemExit(f"an adapter for the test does not answer: {answer.code()}")
            scores[text] = {row["label"]: row["score"] for row in answer.json()}
        found.append(Content(tar, version, scores))
    await connection.ask(encoded(f"/admin/adapters/{name}", method="DELETE", headers=admin))
    connection.abort()
    return found
