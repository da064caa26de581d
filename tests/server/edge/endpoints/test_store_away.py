"""What the administration answers of adapters while the object store is away: what is committed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from adapters.errors import StoreUnavailable
from adapters.registry.names import Names
from adapters.registry.records import AdapterRecord, Canary
from server.edge.endpoints.admin import Admin
from server.edge.endpoints.schemas_admin import PatchRequest
from server.edge.target import Targets

REQUEST: Any = None
FIRST = AdapterRecord(
    name="first",
    version="v1",
    method="hira",
    task="text-generation",
    labels=None,
    ranks=(4, 4),
    targets=("q",),
    tensor_bytes=1,
    parameters=1,
    sparsity=0.0,
    pinned=False,
    created=datetime.now(UTC),
    source="x",
    base_name=None,
    notes=(),
)


class AskedStore:
    """Says what it was asked; away, it answers as an object store that is."""

    def __init__(self, present: Collection[str], *, away: bool = False) -> None:
        self.present = present
        self.away = away
        self.asked: list[set[str]] = []

    def versions(self) -> set[str]:
        raise StoreUnavailable("All of it was asked for.")

    def missing(self, versions: Collection[str]) -> set[str]:
        self.asked.append(set(versions))
        if self.away:
            raise StoreUnavailable("The adapter store cannot be reached now.")
        return set(versions) - set(self.present)


class OneTable:
    """A registry whose rows are in memory, and whose bytes are in ``store``."""

    def __init__(self, store: AskedStore) -> None:
        self.store = store
        canary = Canary(replace(FIRST, version="v3"), 10.0)
        self.rows = {
            "first": FIRST,
            "second": replace(FIRST, name="second", version="v2", canary=canary),
        }

    def records(self) -> dict[str, AdapterRecord]:
        return dict(self.rows)

    def update(self, name: str, *, pinned: bool) -> AdapterRecord:
        self.rows[name] = replace(self.rows[name], pinned=pinned)
        return self.rows[name]


def admin_of(registry: OneTable, residency: dict[str, str]) -> Admin:
    async def run(work: Callable[[], Any], _: str) -> Any:
        return work()

    given: Any = registry
    names = Names(given, lambda: 0)
    names.refresh()
    base: Any = SimpleNamespace(name="base", answers_to=lambda name: name == "base", task="")
    state = SimpleNamespace(snapshot={"residency": residency})
    service: Any = SimpleNamespace(
        registry=registry,
        names=names,
        targets=Targets(names, base),
        dispatcher=SimpleNamespace(state=lambda: state, tell=lambda _: None),
        slow_work=SimpleNamespace(run=run),
        change_registry=run,
    )
    return Admin(service)


def read(answer: Any) -> Any:
    response = asyncio.run(answer)
    assert response.status_code == 200
    return json.loads(response.body)


def test_while_the_store_is_away_adapters_are_shown_and_committed_changes_answered() -> None:
    registry = OneTable(AskedStore((), away=True))
    admin = admin_of(registry, {"v1": "device"})
    first, second = read(admin.list(REQUEST, prefix="", offset=0, limit=9))["adapters"]
    assert (first["residency"], second["residency"]) == ("device", "disk")
    assert second["canary"]["residency"] == "disk"
    assert read(admin.show(REQUEST, "second")) == second
    pinned = read(admin.change(REQUEST, PatchRequest(pinned=True), "second"))
    assert (pinned["pinned"], pinned["residency"]) == (True, "disk")
    assert registry.rows["second"].pinned


def test_the_store_is_asked_only_of_what_the_engine_does_not_have() -> None:
    store = AskedStore({"v2"})
    admin = admin_of(OneTable(store), {"v1": "host"})
    assert read(admin.show(REQUEST, "first"))["residency"] == "host"
    assert store.asked == []
    second = read(admin.show(REQUEST, "second"))
    assert (second["residency"], second["canary"]["residency"]) == ("disk", "lost")
    assert store.asked == [{"v2", "v3"}]
