"""The request router of Ray Serve around our routing, and replicas that are not there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

from server.cluster import router as module
from server.cluster.router import SHUNNED_S, AffinityRouter

VERSION = "v" * 16


@dataclass(frozen=True)
class ReplicaName:
    unique_id: str


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Cache(dict[Any, int]):
    """Queue lengths by replica."""

    def invalidate_key(self, key: Any) -> None:
        self.pop(key, None)


class Router(AffinityRouter):
    """Without what Ray Serve makes of it: its replicas, and lengths of queues."""

    def __init__(self, names: list[str]) -> None:
        self.candidates: list[Any] = [
            SimpleNamespace(replica_id=ReplicaName(name), routing_stats={"resident": [VERSION]})
            for name in names
        ]
        self.lengths = Cache()
        self._deployment_id = SimpleNamespace(name="of-this-test")
        self._queue_len_gauge_last_update: dict[Any, float] = {}
        self._replica_queue_len_cache = self.lengths
        self.initialize_state()

    @property
    def replica_queue_len_cache(self) -> Any:
        return SimpleNamespace(get=lambda _: None)

    @property
    def curr_replicas(self) -> Any:
        return {one.replica_id: one for one in self.candidates}

    @property
    def all_ids(self) -> list[Any]:
        return [one.replica_id for one in self.candidates]

    def order(self, version: str | None = VERSION) -> list[str]:
        request: Any = SimpleNamespace(
            args=[SimpleNamespace(version=version)],
            routing_context=SimpleNamespace(should_backoff=False),
        )
        found = asyncio.run(self.choose_replicas(self.candidates, request))
        return [one.replica_id.unique_id for rank in found for one in rank]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_replica_that_a_call_could_not_reach_is_asked_last_for_a_while(clock: Clock) -> None:
    router = Router(["a", "b", "c"])
    first = router.order()[0]
    gone = next(one for one in router.all_ids if one.unique_id == first)
    router.on_replica_actor_unavailable(gone)
    assert router.order()[-1] == first
    assert router.order(None)[-1] == first
    assert sorted(router.order()) == ["a", "b", "c"]
    clock.now += SHUNNED_S
    assert router.order()[0] == first


def test_where_none_can_be_reached_all_are_asked_and_nobody_is_there(clock: Clock) -> None:
    router = Router(["a", "b"])
    assert router.reachable()
    for one in router.all_ids:
        router.on_replica_actor_unavailable(one)
    assert not router.reachable()
    assert sorted(router.order()) == ["a", "b"]
    router.candidates.append(Router(["new"]).candidates[0])
    assert router.reachable()
    assert router.order()[0] == "new"
    clock.now += SHUNNED_S
    router.candidates.pop()
    assert router.reachable()
