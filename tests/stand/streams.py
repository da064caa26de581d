"""Streams without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from server.messages import Event


def chunks_of(
    stream: Callable[..., AsyncIterator[bytes]], shape: Any, events: Sequence[Event]
) -> list[dict[str, Any]]:
    """What a stream of one choice says, event by event, without its last line."""

    async def rest() -> AsyncIterator[list[tuple[int, Event]]]:
        for one in events[1:]:
            yield [(0, one)]

    async def run() -> list[bytes]:
        first = [(0, events[0])]
        made = stream(shape, first, rest(), choices=1, copies=1, with_usage=False)
        return [one async for one in made]

    lines = asyncio.run(run())
    assert lines[-1] == b"data: [DONE]\n\n"
    return [json.loads(one.removeprefix(b"data: ")) for one in lines[:-1]]
