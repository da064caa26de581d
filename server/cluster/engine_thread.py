"""Drives one engine on a thread of its own: messages in, the events of a step out.

It knows neither Ray nor HTTP; whoever makes it says what becomes of the events.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry

from server.edge.link.engine_like import EngineLike
from server.messages import Event, Message
from server.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

WAIT_S: Final = 0.25
FIGURES_S: Final = 0.25  # the engine's figures are at most so old


class EngineThread:
    """See the module.

    Args:
        engine: Used by this thread alone from now on, but for ``wake``.
        deliver: Called on the thread with what a step brought.
        died: Called on it when the engine raised: its state is not known after that.
    """

    def __init__(
        self,
        engine: EngineLike,
        deliver: Callable[[list[Event]], None],
        died: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._died = died
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._step_began = 0.0  # monotonic; 0 between steps
        self._snapshot: Mapping[str, Any] = {}
        # Counted in files, which the HTTP replicas of this node read; nobody collects them here.
        self._metrics = WorkerMetrics(CollectorRegistry())
        self._look()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, message: Message) -> None:
        """Hand a message over; from any thread."""
        self._inbox.put(message)
        self._engine.wake()

    @property
    def snapshot(self) -> Mapping[str, Any]:
        """What the engine said of itself last, by the names of ``EngineSnapshot``."""
        return self._snapshot

    @property
    def busy_s(self) -> float:
        """How long the present step has taken; 0 between steps."""
        began = self._step_began
        return time.monotonic() - began if began else 0.0

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End the engine; what still runs fails."""
        self._ending.set()
        self._engine.wake()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            self._pump()
            self._deliver(self._engine.close())
        except BaseException:
            # The engine fails single requests itself; after this its state is not known.
            logger.exception("The engine failed")
            self._died()

    def _pump(self) -> None:
        engine, looked, seen = self._engine, time.monotonic(), self._engine.last_step
        while not self._ending.is_set():
            while not self._inbox.empty():
                engine.submit(self._inbox.get())
            if engine.has_work():
                self._step_began = time.monotonic()
                events = engine.step()
                self._step_began = 0.0
                if events:
                    self._deliver(events)
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
            if time.monotonic() - looked > FIGURES_S:
                looked = time.monotonic()
                self._look()

    def _look(self) -> None:
        self._metrics.loads(self._engine.take_load_seconds())
        snapshot = self._engine.snapshot()
        # Not asdict: it takes Counters apart wrongly.
        self._snapshot = (
            {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
            if is_dataclass(snapshot)
            else dict(snapshot)
        )
