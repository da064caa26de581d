"""A whole engine over a tiny base, with adapters for three tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import Engine
from server.messages import (
    TERMINAL,
    EncodeRequest,
    EncodeResult,
    Event,
    Preload,
)
from tests.stand import tiny_bases

LABELS = {"mood": ("bad", "fine", "great"), "topics": ("art", "war"), "names": ("O", "B-X", "I-X")}


@dataclass
class World:
    """An encoder with three adapters: two methods, three heads."""

    base: Path
    store: Path
    folders: dict[str, Path]
    versions: dict[str, str]
    engine: Engine

    def request(self, adapter: str | None, texts: list[str], task: str, **more: Any) -> Any:
        kind: Any = task
        return EncodeRequest(
            id=more.pop("id", f"{adapter}-{task}-{len(texts)}"),
            task=kind,
            adapter=adapter,
            version=more.pop("version", self.versions[adapter] if adapter else None),
            inputs=self.engine.text.tokenize(texts, kind),
            submitted=time.monotonic(),
            **more,
        )

    def drain(self) -> list[Event]:
        return drain(self.engine)


def drain(engine: Engine, seconds: float = 60.0) -> list[Event]:
    """Step until nothing waits."""
    events: list[Event] = []
    until = time.monotonic() + seconds
    while engine.has_work() or any(engine.snapshot().queue_depth.values()):
        assert time.monotonic() < until, "the engine did not come to an end"
        if not engine.has_work():
            engine.wait(0.05)
        events += engine.step()
    return events


def by_id(events: list[Event]) -> dict[str, Event]:
    ended = [event for event in events if isinstance(event, TERMINAL)]
    assert len({event.id for event in ended}) == len(ended), "two ends of one request"
    return {event.id: event for event in ended}


def outputs(event: Event) -> tuple[Any, ...]:
    assert isinstance(event, EncodeResult), event
    return event.outputs


@pytest.fixture(scope="module", params=["distilbert", "bert"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp(request.param)
    base, store = tiny_bases.base_folder(root, request.param), root / "store"
    made = {
        "mood": tiny_bases.adapter(
            root / "mood", base, "text-classification", labels=LABELS["mood"], seed=1
        ),
        "topics": tiny_bases.adapter(
            root / "topics",
            base,
            "text-classification",
            method="lora",
            labels=LABELS["topics"],
            problem_type="multi_label_classification",
            seed=2,
        ),
        "names": tiny_bases.adapter(
            root / "names", base, "token-classification", labels=LABELS["names"], rank=3, seed=3
        ),
    }
    versions = {name: tiny_bases.stored(store, folder) for name, folder in made.items()}
    engine = Engine.build(tiny_bases.options(base, store))
    yield World(base, store, made, versions, engine)
    engine.close()


def preload(world: World) -> None:
    for version in world.versions.values():
        world.engine.submit(Preload(version))
    until = time.monotonic() + 60
    while any(world.engine.residency.state(v) != "ready" for v in world.versions.values()):
        assert time.monotonic() < until
        world.engine.wait(0.05)
