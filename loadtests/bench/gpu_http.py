"""The real server on a device, in its own processes: streams of 1, 16 and 64 clients.

Before them one text is classified, and one completion is streamed to OpenAI's own client: what they
are answered is held, not timed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Literal

import torch

from loadtests.bench.generation import LABELS
from loadtests.bench.gpu_bases import StoredBase
from loadtests.bench.live import Connection, Server, running
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Figure, Report, percentile
from server.options import DecodeSteps

_PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"


def measure_http(
    report: Report,
    case: str,
    made: StoredBase,
    adapters: int,
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
        made: The base and its adapters.
        adapters: How many of them; client n asks adapter n, and again from the first.
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
    folders = [*made.folders[:adapters], made.classifier]
    names = [one.name for one in folders[:adapters]]
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    with running(made.base, folders, "bf16", device=kind, more=more) as server:
        asyncio.run(_classify(server, made.classifier.name))
        done = _complete(server, names[0], new_tokens)
        named = f"{case}, HTTP"
        report.add(Figure("gpu", named, "texts classified by /predict", 1, unit="texts"))
        if done is None:
            report.leave_out(f"{named}: OpenAI's client: it is not installed")
        else:
            report.add(Figure("gpu", named, "pieces to OpenAI's client", done, unit="pieces"))
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


async def _classify(server: Server, name: str) -> None:
    connection = await Connection.open(server.port)
    try:
        found = json.loads(await connection.ask(f"/predict?adapter={name}", {"inputs": _PROMPT}))
    finally:
        await connection.close()
    if not {one["label"] for one in found} <= set(LABELS) or not found:
        raise SystemExit(f"/predict answered {str(found)[:200]}")


def _complete(server: Server, name: str, new_tokens: int) -> int | None:
    """Stream one completion to OpenAI's client; how many pieces came, None without the client."""
    try:
        import openai
    except ImportError:
        return None
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        stream = client.completions.create(
            model=name, prompt=_PROMPT, max_tokens=new_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = [one.choices[0] for one in stream if one.choices]
    if not pieces or pieces[-1].finish_reason != "length":
        raise SystemExit(f"OpenAI's client was sent {len(pieces)} pieces, and no end by length")
    return len(pieces)


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
