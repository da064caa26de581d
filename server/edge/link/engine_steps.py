"""Steps one engine for as long as there is somebody to answer: what every driver of one does.

Whoever drives it brings requests, takes events, and says when it is over; it knows neither queues
nor HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from server.edge.link.engine_like import EngineLike
from server.messages import Event
from server.metrics import WorkerMetrics

WAIT_S: Final = 0.25  # for work, before it is asked again whether this is over


class EngineSteps:
    """Steps an engine on the thread that calls `run`; the rest may be read from any thread.

    Args:
        engine: Used by that thread alone, but for ``wake``.
        metrics: Count its steps.
        figures_s: What the engine says of itself is at most so old, while it is not in a step.
    """

    def __init__(self, engine: EngineLike, metrics: WorkerMetrics, figures_s: float) -> None:
        self._engine = engine
        self._metrics = metrics
        self._figures_s = figures_s
        self._began = 0.0  # monotonic; 0 between steps
        self._looked = time.monotonic()
        # What the engine said of itself last, by the names of ``EngineSnapshot``.
        self.snapshot: Mapping[str, Any] = {}

    @property
    def busy_s(self) -> float:
        """How long the present step has taken; 0 between steps."""
        began = self._began
        return time.monotonic() - began if began else 0.0

    def run(
        self,
        hand_over: Callable[[], None],
        deliver: Callable[[list[Event]], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Step until it is over.

        Args:
            hand_over: Called before each step: submits what has arrived.
            deliver: Called with what a step brought, if anything.
            is_over: Asked before each step.

        Raises:
            BaseException: As the engine: it fails single requests itself, and after this its state
                is not known.
        """
        engine, seen = self._engine, self._engine.last_step
        while not is_over():
            hand_over()
            if engine.has_work():
                self._began = time.monotonic()
                events = engine.step()
                self._began = 0.0
                if events:
                    deliver(events)
                step = engine.last_step
                if step is not None and step is not seen:
                    seen = step
                    self._metrics.step(
                        step.lane,
                        rows=step.rows,
                        adapters=step.adapters,
                        seconds=step.seconds,
                        waits_s=step.waits_s,
                    )
            else:
                engine.wait(WAIT_S)
            if time.monotonic() - self._looked > self._figures_s:
                self.look()

    def look(self) -> None:
        """Ask the engine how it stands, and count what it loaded; on its thread."""
        self._looked = time.monotonic()
        self._metrics.loads(self._engine.take_load_seconds())
        self._metrics.store(self._engine.take_store_notes())
        snapshot = self._engine.snapshot()
        # Not asdict: it takes Counters apart wrongly.
        self.snapshot = (
            {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
            if is_dataclass(snapshot)
            else dict(snapshot)
        )
