"""Who else is there: texts far too long, hostile uploads, and a probe that feels every stall."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Final

from loadtests.chaos.windows import Windows
from loadtests.connection import Connection, Lost, encoded
from loadtests.mutants import Maker

LONG_BYTES: Final = 6_000_000
PROBE_S: Final = 0.1
UPLOAD_S: Final = 1.0
PATIENCE_S: Final = 60.0
# As refused: too long a text, too many such at once, a server that is being broken meanwhile.
EXPECTED: Final = frozenset({400, 413, 422, 429, 503})
# Only these may keep the HTTP processes from a sign of life.
HTTP_BREAKS: Final = frozenset(
    {"kill_everything", "kill_http_process", "stop_http_process_for_a_moment"}
)
# What a hostile upload may get besides; 0: refused, and the connection closed, before it was read.
UPLOAD_EXPECTED: Final = frozenset({0, 200, 201, 401, 403, 404, 408, 409, 415, 431, 507})


@dataclass
class Seen:
    """What strangers met."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0  # of the probe, while HTTP was let alone
    probes: int = 0


async def send_long_texts(
    port: int, over: asyncio.Event, windows: Windows, seen: Seen, *, seed: int, every_s: float
) -> None:
    """Bodies of megabytes to every call that tokenizes; each must be refused by name."""
    rng = random.Random(f"{seed}-long")
    words = " ".join(rng.choice(("king", "film", "the", "1984", "Warm")) for _ in range(2000))
    text = (words * (LONG_BYTES // len(words) + 1))[:LONG_BYTES]
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/predict?adapter=hira-imdb", {"inputs": text}),
        ("/generate?adapter=hira-wiki", {"inputs": text}),
        ("/v1/completions", {"model": "hira-wiki", "prompt": text}),
        ("/predict?adapter=hira-imdb", {"inputs": [text[:40_000]] * 100}),
    )
    raws = [encoded(path, body) for path, body in calls]
    while not over.is_set():
        await _stranger(port, rng.choice(raws), "long text", windows, seen)
        await _pause(over, every_s * (0.5 + rng.random()))


async def send_hostile_uploads(
    port: int,
    over: asyncio.Event,
    windows: Windows,
    seen: Seen,
    *,
    admin: Mapping[str, str],
    maker: Maker,
) -> None:
    """Mutants of an adapter; what is accepted as harmless is removed again."""
    index = 0
    while not over.is_set():
        mutant = maker.make(index)
        index += 1
        headers = dict(admin)
        if mutant.content_type is not None:
            headers["Content-Type"] = mutant.content_type
        raw = encoded("/admin/adapters", mutant.body, headers=headers)
        status = await _stranger(port, raw, "hostile upload", windows, seen, also=UPLOAD_EXPECTED)
        if status in {200, 201} and mutant.name:
            path = f"/admin/adapters/{mutant.name}"
            removal = encoded(path, method="DELETE", headers=admin)
            await _stranger(port, removal, "removal", windows, seen, also={204, 404})
        await _pause(over, UPLOAD_S)


async def probe(
    port: int, over: asyncio.Event, windows: Windows, seen: Seen, *, stall_s: float
) -> None:
    """Ask for a sign of life ten times a second: none may take long while HTTP is let alone."""
    raw = encoded("/health/live", method="GET", headers={"Connection": "close"})
    while not over.is_set():
        began = time.monotonic()
        fault = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await Connection.open(port)
                reply = await connection.ask(raw)
                connection.abort()
            if reply.status != 200:
                fault = f"/health/live: {reply.code()}"
        except TimeoutError:
            fault = f"/health/live: no answer within {PATIENCE_S:g} s"
        except (Lost, OSError) as error:
            fault = f"/health/live: {type(error).__name__} {error}"
        took = time.monotonic() - began
        seen.probes += 1
        if windows.cover(began, time.monotonic()) not in HTTP_BREAKS:
            seen.slowest_s = max(seen.slowest_s, took)
            if fault is None and took > stall_s:
                fault = f"/health/live took {took:.1f} s"
            if fault is not None:
                seen.faults.append(fault)
        await _pause(over, PROBE_S)


async def _stranger(
    port: int,
    raw: bytes,
    kind: str,
    windows: Windows,
    seen: Seen,
    *,
    also: Set[int] = frozenset(),
) -> int | None:
    began = time.monotonic()
    status = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            connection = await Connection.open(port)
            reply = await connection.ask(raw)
            connection.abort()
        status, outcome = reply.status, reply.code()
    except TimeoutError:
        outcome = f"no answer within {PATIENCE_S:g} s"
    except (Lost, OSError) as error:
        outcome = f"{type(error).__name__}"
        # A body that is refused before it is read may close the connection under the sender.
        if kind == "hostile upload":
            status = 0
    seen.outcomes[f"{kind}: {outcome}"] += 1
    good = status in EXPECTED | also
    if not good and windows.cover(began, time.monotonic()) is None:
        seen.faults.append(f"{kind}: {outcome}")
    return status


async def _pause(over: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await over.wait()
    except TimeoutError:
        return
