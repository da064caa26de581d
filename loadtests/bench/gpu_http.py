"""The real server on a device, in its own processes: streams of 1, 16 and 64 clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from loadtests.bench.live import Connection, Server, running
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Figure, Report, percentile
from server.options import DecodeSteps

CLIENTS = (1, 16, 64)
_PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"


def measure_http(
    report: Report,
    case: str,
    base: Path,
    adapters: Sequence[Path],
    *,
    device: torch.device,
    steps: DecodeSteps,
    new_tokens: int,
    clients: Sequence[int],
    kv_bytes: int,
    clock: PartClock,
) -> None:
    """Start ``hira serve`` on a base, and let so many clients stream at once, twice each.

    Args:
        report: Gets the figures.
        case: Named in them.
        base: Its folder.
        adapters: Folders; client n asks adapter n, and again from the first.
        device: cpu or cuda.
        steps: ``decode_steps`` of the server.
        new_tokens: Of each answer.
        clients: How many at once.
        kv_bytes: Of the server.
        clock: What does not fit is left out.

    Raises:
        SystemExit: The server did not start, or a request failed.
    """
    more = [f"--decode-steps={steps}", f"--max-sequences={max(clients)}", f"--kv-bytes={kv_bytes}"]
    names = [one.name for one in adapters]
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    with running(base, adapters, "bf16", device=kind, more=more) as server:
        for count in clients:
            if not clock.has_time(f"{count} clients"):
                continue
            asyncio.run(_streams(server, names, count, 2))
            firsts, seconds = asyncio.run(_streams(server, names, count, new_tokens))
            named = f"{case}, HTTP, {count} clients"
            rate = count * new_tokens / seconds
            report.add(Figure("gpu", named, f"{steps} steps", rate, unit="tokens/s"))
            for share in (0.5, 0.99):
                what = f"time to first token, p{share * 100:.0f}"
                value = percentile(firsts, share) * 1e3
                report.add(Figure("gpu", named, what, value, unit="ms"))


async def _streams(
    server: Server, names: Sequence[str], count: int, new_tokens: int
) -> tuple[list[float], float]:
    """Seconds to the first token of each stream, and to the end of all."""
    connections = [await Connection.open(server.port) for _ in range(count)]
    firsts: list[float] = []

    async def client(number: int) -> None:
        began, seen = time.perf_counter(), 0
        path = f"/generate_stream?adapter={names[number % len(names)]}"
        wanted = {"max_new_tokens": new_tokens, "ignore_eos_token": True}
        body = {"inputs": f"{_PROMPT} {number}", "parameters": wanted}
        async for piece in connections[number].post(path, body):
            found = piece.count(b'"token":')
            if found and not seen:
                firsts.append(time.perf_counter() - began)
            seen += found
        if seen != new_tokens:
            raise SystemExit(f"{seen} tokens were streamed, {new_tokens} asked for")

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(count)))
    seconds = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    return firsts, seconds
