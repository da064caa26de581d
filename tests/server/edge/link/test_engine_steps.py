"""What every driver of an engine does with it, around the fake one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.edge.link.engine_steps import EngineSteps
from server.messages import EncodeRequest, Event, TokenizedInput
from server.metrics import WorkerMetrics
from server.options import EngineOptions
from tests.stand.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(EngineOptions(base="none", store_dir=Path("s"), cache_dir=Path("c")))


def request(id_: str) -> EncodeRequest:
    return EncodeRequest(id_, "text-classification", None, None, (TokenizedInput((1, 2)),))


def test_what_arrives_is_answered_and_each_step_is_counted_once(engine: FakeEngine) -> None:
    registry = CollectorRegistry()
    steps = EngineSteps(engine, WorkerMetrics(registry), figures_s=60.0)
    arrived = [request("1"), request("2"), request("3")]
    answered: list[Event] = []

    def hand_over() -> None:
        if arrived:
            engine.submit(arrived.pop())

    engine.wake()  # the last turn has nothing to do, and need not wait
    steps.run(hand_over, answered.extend, lambda: len(answered) == 3 and not arrived)
    assert sorted(event.id for event in answered) == ["1", "2", "3"]
    text = generate_latest(registry).decode()
    assert 'hira_batch_rows_count{lane="encode"} 3.0' in text
    assert 'hira_queue_seconds_count{lane="encode"} 3.0' in text


def test_each_load_is_counted_once(engine: FakeEngine) -> None:
    registry = CollectorRegistry()
    steps = EngineSteps(engine, WorkerMetrics(registry), figures_s=60.0)
    engine.load_seconds = [0.5, 0.25]
    steps.look()
    steps.look()
    text = generate_latest(registry).decode()
    assert "hira_adapter_load_seconds_count 2.0" in text
    assert "hira_adapter_load_seconds_sum 0.75" in text


def test_figures_are_those_of_the_latest_look(engine: FakeEngine) -> None:
    steps = EngineSteps(engine, WorkerMetrics(CollectorRegistry()), figures_s=0.0)
    assert steps.snapshot == {}
    turns = iter([False, True])
    engine.wake()
    steps.run(lambda: engine.submit(request("1")), lambda events: None, lambda: next(turns))
    assert steps.snapshot["queue_depth"] == {"encode": 0, "generate": 0}
    engine.submit(request("2"))
    steps.look()
    assert steps.snapshot["queue_depth"]["encode"] == 1


def test_a_step_is_busy_while_it_runs_and_its_error_is_passed_on(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = EngineSteps(engine, WorkerMetrics(CollectorRegistry()), figures_s=60.0)
    seen: list[float] = []

    def step() -> Any:
        time.sleep(0.01)
        seen.append(steps.busy_s)
        raise MemoryError

    monkeypatch.setattr(engine, "step", step)
    engine.submit(request("1"))
    assert steps.busy_s == 0.0
    with pytest.raises(MemoryError):
        steps.run(lambda: None, lambda events: None, lambda: False)
    assert seen[0] > 0.0
