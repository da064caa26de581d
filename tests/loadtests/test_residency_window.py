"""The window of the residency bench in which adapters are loaded: a failure is no fast answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loadtests.bench.residency import WARM_CLIENTS, _window
from server.messages import EncodeResult, Failure, Preload

COLD = ("c", "d")


class FakeEngine:
    """Answers at once; cold adapters reach ``end`` after some steps."""

    def __init__(self, end: str, failing: int = -1) -> None:
        self.end = end
        self.failing = failing
        self.steps = self.asked = 0
        self.asking: list[str] = []
        self.preloads: list[str] = []
        self.residency = SimpleNamespace(state=self._state, error=lambda version: "no such file")

    def submit(self, one: Any) -> None:
        if isinstance(one, Preload):
            self.preloads.append(one.version)
        else:
            self.asking.append(one.id)

    def step(self) -> list[Any]:
        self.steps += 1
        assert self.steps < 50, "the window never ends"
        events: list[Any] = []
        for name in self.asking:
            if self.asked == self.failing:
                events.append(Failure(name, "worker_lost", "it broke"))
            else:
                events.append(object.__new__(EncodeResult))
                object.__setattr__(events[-1], "id", name)
            self.asked += 1
        self.asking = []
        return events

    def _state(self, version: str) -> str:
        if self.steps < 3:
            return "loading"
        return self.end if version == COLD[-1] else "ready"


def _run(engine: FakeEngine) -> tuple[list[float], float]:
    found: Any = engine
    return _window(found, ["a", "b"], COLD)


def test_the_window_ends_when_all_are_ready() -> None:
    engine = FakeEngine("ready")
    latencies, took = _run(engine)
    assert engine.preloads == list(COLD)
    assert len(latencies) == engine.asked >= 3 * WARM_CLIENTS
    assert took > 0


@pytest.mark.parametrize("failing", [0, 6])
def test_a_failed_request_ends_the_bench(failing: int) -> None:
    with pytest.raises(SystemExit, match="worker_lost"):
        _run(FakeEngine("ready", failing))


def test_a_cold_adapter_that_fails_ends_the_bench() -> None:
    with pytest.raises(SystemExit, match="d failed to load: no such file"):
        _run(FakeEngine("failed"))
