"""An adapter that keeps failing, in the real engine: shut out alone, visibly, and let in again."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.engine import Engine
from server.errors import Refusal
from server.messages import Event, Failure, Lift
from tests.server import tiny_bases
from tests.server.test_engine import World, by_id, outputs, preload, world

__all__ = ["world"]  # the fixture


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Make the heads of one version raise."""
    reader: Any = engine._parts.encode._reader
    read = reader.read

    def broken(group: Any, weights: Any) -> Any:
        if group.version == version:
            raise RuntimeError("a head of stone")
        return read(group, weights)

    monkeypatch.setattr(reader, "read", broken)


def test_adapter_that_keeps_failing_is_quarantined_alone_until_it_is_lifted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload(world)
    engine, bad = world.engine, world.versions["mood"]
    sample = tiny_bases.texts(1, seed=3)

    def ask(adapter: str, number: int) -> Event:
        engine.submit(
            world.request(adapter, sample, "text-classification", id=f"{adapter}-{number}")
        )
        return by_id(world.drain())[f"{adapter}-{number}"]

    good = outputs(ask("mood", 0))
    before = engine.snapshot().totals["quarantine"]
    with monkeypatch.context() as patch:
        failing(engine, patch, bad)
        for number in range(1, 6):
            event = ask("mood", number)
            assert isinstance(event, Failure)
            assert event.code == "internal"
            outputs(ask("topics", number))
    event = ask("mood", 10)  # its head would work again, but nobody has said so
    assert isinstance(event, Failure)
    assert event.code == "adapter_quarantined"
    assert "a head of stone" not in (event.message + str(event.fix))
    assert 0 < (event.retry_after_s or 0) <= 60
    assert Refusal.of(event).headers["Retry-After"] == str(event.retry_after_s)
    snapshot = engine.snapshot()
    assert set(snapshot.quarantined) == {bad}
    assert snapshot.quarantined[bad][0] > time.time()
    assert snapshot.totals["quarantine"] == before + 1
    outputs(ask("topics", 10))
    engine.submit(Lift(bad))
    assert engine.snapshot().quarantined == {}
    assert outputs(ask("mood", 11)) == good
