"""Requests run through an engine to their ends, in the process of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.engine import Engine
from server.messages import TERMINAL, EncodeRequest, Event, Failure, GenerateRequest


def raise_if_failed(event: Event) -> None:
    """End the run when a request has failed: its time would not be comparable."""
    if isinstance(event, Failure):
        raise SystemExit(f"the engine failed a request: {event.code}: {event.message}")


def run_to_end(
    engine: Engine, requests: Sequence[EncodeRequest | GenerateRequest]
) -> dict[str, Event]:
    """Submit all requests at once and step until each has ended.

    Args:
        engine: Idle before and after.
        requests: With ids that the engine does not have.

    Returns:
        The last event of each, by its id.

    Raises:
        SystemExit: A request failed.
    """
    for one in requests:
        engine.submit(one)
    ended: dict[str, Event] = {}
    while len(ended) < len(requests):
        if not engine.has_work():
            engine.wait(1.0)
        for event in engine.step():
            raise_if_failed(event)
            if isinstance(event, TERMINAL):
                ended[event.id] = event
    return ended
