"""What HTTP processes do while the registry's database hangs or is away: answer, and say so."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import RegistryUnavailable
from adapters.registry.names import Names
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.edge.admit.slow_work import SlowWork
from server.edge.link.dispatcher import Dispatcher
from server.edge.processes import serve
from server.edge.processes.serve import Collector
from server.edge.service import Service
from server.edge.target import Targets
from server.errors import Refusal
from server.settings import Settings, load_settings


def row_of(version: str) -> SimpleNamespace:
    """What is needed of a record."""
    return SimpleNamespace(
        version=version, fits=lambda _: True, aliases=(), canary=None, versions=lambda: (version,)
    )


class Registry:
    """Shared by all processes of a test."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {"a": row_of("v1")}
        self.away = False
        self.gate = threading.Event()
        self.gate.set()

    def records(self) -> Any:
        assert self.gate.wait(60)
        if self.away:
            raise RegistryUnavailable("The registry cannot be used now.")
        return dict(self.rows)


def process(registry: Registry, load: SharedLoad, number: int) -> Service:
    """The part of a service that reads and changes the registry."""
    made = Service.__new__(Service)
    made.load = load
    made.names = Names(registry, load.registry_changes)
    made.names.refresh()
    made._number, made._changing, made._reading = number, threading.Lock(), None
    made._reader = ThreadPoolExecutor(1)
    base: Any = SimpleNamespace(answers_to=lambda name: name == "base")
    made.targets = Targets(made.names, base)
    made.dispatcher = Dispatcher(load, Bounds(9, 9, 9), 1, Path("none"))
    made.slow_work = SlowWork(Settings(), made.dispatcher.admission, made.dispatcher.give_up)
    made.slow_work.open()
    return made


def test_a_change_that_one_process_acknowledged_is_known_to_all_at_once() -> None:
    async def run() -> None:
        registry, load = Registry(), SharedLoad(2)
        writer, reader = process(registry, load, 0), process(registry, load, 1)
        for turn in range(20):
            row = row_of(f"v{turn}")
            await writer.change_registry(lambda row=row: registry.rows.update(a=row), "records")  # type: ignore[misc]
            for one in (reader, writer):
                await one.catch_up()
                assert one.targets.record("a").version == f"v{turn}"

    asyncio.run(run())


def test_an_event_loop_never_waits_for_a_database_that_hangs() -> None:
    async def run() -> None:
        registry, load = Registry(), SharedLoad(2)
        one = process(registry, load, 0)
        registry.gate.clear()
        load.registry_changed(1)
        waiting = [asyncio.create_task(one.catch_up()) for _ in range(10)]
        for _ in range(20):  # would never come to an end on a loop that waits for the gate
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        registry.gate.set()
        await asyncio.gather(*waiting)
        assert one.targets.record("a").version == "v1"

    asyncio.run(run())


def test_while_the_database_is_away_answers_go_on_and_changes_are_refused() -> None:
    async def run() -> None:
        registry, load = Registry(), SharedLoad(2)
        one = process(registry, load, 0)
        registry.away = True
        await one._read_registry()
        await one.catch_up()
        assert one.targets.record("a").version == "v1"
        with pytest.raises(RegistryUnavailable):
            await one.change_registry(registry.records, "records")
        await one.catch_up()
        assert one.targets.record("a").version == "v1"  # a change that failed spoils nothing
        load.registry_changed(1)  # but one that succeeded elsewhere is not guessed
        await one.catch_up()
        with pytest.raises(Refusal) as caught:
            one.targets.record("a")
        assert caught.value.status == 503
        assert int(caught.value.all_headers()["Retry-After"]) >= 1
        registry.away = False
        await one._read_registry()
        assert one.targets.record("a").version == "v1"

    asyncio.run(run())


def test_a_change_that_succeeds_ends_the_time_in_which_the_database_is_away() -> None:
    async def run() -> None:
        registry = Registry()
        one = process(registry, SharedLoad(1), 0)
        registry.away = True
        await one._read_registry()
        registry.away = False
        row = row_of("v9")
        await one.change_registry(lambda: registry.rows.update(new=row), "records")
        await one.catch_up()
        assert one.targets.record("new").version == "v9"

    asyncio.run(run())


def test_the_collector_takes_over_a_longer_limit_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "COLLECT_S", 0.0)
    graces: list[float] = []
    service: Any = SimpleNamespace(
        settings=limited(tmp_path, 300.0),  # of the start
        dispatcher=SimpleNamespace(state=lambda: None),  # the worker has not spoken
        registry=SimpleNamespace(collect_garbage=lambda _, grace_s: graces.append(grace_s)),
    )
    collector = Collector(service)
    for seconds in (100.0, 900.0, 100.0):  # what SIGHUP brings
        service.settings = limited(tmp_path, seconds)
        collector.look()
    assert graces == [360.0, 960.0, 960.0]


def limited(run_dir: Path, max_timeout_s: float) -> Any:
    return load_settings({"data_dir": str(run_dir), "max_timeout_s": str(max_timeout_s)})
