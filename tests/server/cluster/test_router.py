"""The request router of Ray Serve around our routing, and replicas that are not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
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


class Replica:
    """One that says whether it is there as ``there`` has it."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaName(name)
        self.name = name
        self.routing_stats = {"resident": [VERSION]}
        self.heard = 0.0
        self.there = True

    async def greets(self) -> bool:
        await asyncio.sleep(0)
        return self.there


class Router(AffinityRouter):
    """Without what Ray Serve makes of it: its replicas, and lengths of queues."""

    def __init__(self, names: list[str]) -> None:
        self.candidates: list[Any] = [Replica(name) for name in names]
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

    async def order(self, version: str | None = VERSION) -> list[str]:
        request: Any = SimpleNamespace(
            args=[SimpleNamespace(version=version)],
            routing_context=SimpleNamespace(should_backoff=False),
        )
        found = await self.choose_replicas(self.candidates, request)
        return [one.replica_id.unique_id for rank in found for one in rank]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "ASKED_AGAIN_S", 0.01)
    return made


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def becomes(condition: Callable[[], bool]) -> None:
    """What tasks of this loop bring about; ``run`` bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


def nobody_looks() -> bool:
    """Whether all replicas that were asked have answered, or are nobody's affair."""
    return not [one for one in asyncio.all_tasks() if one.get_name() == "look-for-replica"]


def test_a_replica_that_a_call_could_not_reach_is_asked_last_for_a_while(clock: Clock) -> None:
    async def scenario() -> None:
        router = Router(["a", "b", "c"])
        first = (await router.order())[0]
        gone = next(one for one in router.all_ids if one.unique_id == first)
        router.on_replica_actor_unavailable(gone)
        assert (await router.order())[-1] == first
        assert (await router.order(None))[-1] == first
        assert sorted(await router.order()) == ["a", "b", "c"]
        await becomes(nobody_looks)
        clock.now += SHUNNED_S
        assert (await router.order())[0] == first

    run(scenario())


def test_the_only_replica_stays_reachable_when_a_call_breaks_and_it_is_there(clock: Clock) -> None:
    async def scenario() -> None:
        router = Router(["a"])
        router.on_replica_actor_unavailable(router.all_ids[0])
        assert router.reachable()
        assert await router.order() == ["a"]
        await becomes(nobody_looks)
        assert router.reachable()

    run(scenario())


def test_a_replica_whose_process_is_silent_is_not_there_until_it_answers(clock: Clock) -> None:
    async def scenario() -> None:
        router = Router(["a", "b"])
        for one in router.candidates:
            one.there = False
            router.on_replica_actor_unavailable(one.replica_id)
        await becomes(lambda: not router.reachable())
        assert sorted(await router.order()) == ["a", "b"]
        clock.now += 10 * SHUNNED_S
        assert not router.reachable()
        router.candidates.append(Replica("new"))
        assert router.reachable()
        assert (await router.order())[0] == "new"
        router.candidates.pop()
        router.candidates[0].there = True
        await becomes(router.reachable)
        assert (await router.order())[0] == "a"

    run(scenario())


def test_who_is_there_no_more_is_not_asked_for_ever(clock: Clock) -> None:
    async def scenario() -> None:
        router = Router(["a"])
        gone = router.candidates[0]
        gone.there = False
        router.on_replica_actor_unavailable(gone.replica_id)
        await becomes(lambda: router.silent == {"a"})
        router.candidates.clear()
        await becomes(nobody_looks)
        assert router.silent == set()

    run(scenario())
