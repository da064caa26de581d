"""Drives one engine on a thread of its own: messages in, the events of a step out.

It knows neither Ray nor HTTP; whoever makes it says what becomes of the events.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry

from server.edge.link.engine_like import EngineLike
from server.edge.link.engine_steps import EngineSteps
from server.messages import Event, Message
from server.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

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
        # Counted in files, which the HTTP replicas of this node read; nobody collects them here.
        self._steps = EngineSteps(engine, WorkerMetrics(CollectorRegistry()), FIGURES_S)
        self._steps.look()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, message: Message) -> None:
        """Hand a message over; from any thread."""
        self._inbox.put(message)
        self._engine.wake()

    @property
    def snapshot(self) -> Mapping[str, Any]:
        """What the engine said of itself last, by the names of ``EngineSnapshot``."""
        return self._steps.snapshot

    @property
    def busy_s(self) -> float:
        """How long the present step has taken; 0 between steps."""
        return self._steps.busy_s

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
            self._steps.run(self._hand_over, self._deliver, self._ending.is_set)
            self._deliver(self._engine.close())
        except BaseException:
            # The engine fails single requests itself; after this its state is not known.
            logger.exception("The engine failed")
            self._died()

    def _hand_over(self) -> None:
        while not self._inbox.empty():
            self._engine.submit(self._inbox.get())
