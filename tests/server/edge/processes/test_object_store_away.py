"""A server whose adapters are in an object store that goes away, loses bytes and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.registry.objects import Objects
from tests.stand import object_store
from tests.stand.live import ON_CLUSTER, Live, hira
from tests.stand.made import make_adapter
from tests.stand.waits import until

pytestmark = [pytest.mark.http, pytest.mark.timeout(600)]

MISSING = object_store.why_not()
if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)

ANSWER_S = 20.0  # of a call while the store is away: a few of the store's own bounds
PLACE = "s3://adapters/served"


@dataclass
class World:
    """A server on an object store of its own, and what each name answered when all was well."""

    live: Live
    store: object_store.ObjectStore
    sources: Path
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    def ask(self, name: str) -> httpx2.Response:
        body = {"inputs": "A fine film, warmly played."}
        return self.live.client.post(f"/predict?adapter={name}", json=body, timeout=ANSWER_S)

    def check(self, name: str) -> None:
        answer = self.ask(name)
        assert answer.status_code == 200, answer.text
        scores = {one["label"]: one["score"] for one in answer.json()}
        assert scores == pytest.approx(self.known.setdefault(name, scores), abs=1e-4)

    def register(self, name: str, seed: int) -> httpx2.Response:
        folder = self.sources / f"{name}-{seed}"
        if not folder.exists():
            make_adapter(folder, seed=seed, labels=("LOW", "HIGH"))
        body = {"name": name, "source": str(folder), "replace": True}
        return self.live.client.post(
            "/admin/adapters", json=body, headers=self.live.admin, timeout=ANSWER_S
        )

    def version(self, name: str) -> str:
        shown = self.live.client.get(f"/admin/adapters/{name}", headers=self.live.admin)
        return str(shown.json()["version"])

    def refused(self, name: str) -> None:
        answer = self.register(name, 99)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert {"found", "expected", "fix"} <= answer.json().keys()

    def back(self, name: str) -> None:
        until(lambda: self.register(name, 99).status_code != 503)
        answer = self.register(name, 99)
        assert answer.status_code in {200, 201}, answer.text
        self.check(name)

    def forget(self, name: str) -> None:
        """Take a version from this machine's disk, as an eviction does; memory may have it yet."""
        folder = self.live.folder / "store-cache" / "versions" / self.version(name)
        folder.rename(self.live.folder / f"forgotten-{name}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    sources = tmp_path_factory.mktemp("sources")
    patch = pytest.MonkeyPatch()
    with object_store.object_store() as store:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        data = tmp_path_factory.mktemp("served") / "data"
        settings: dict[str, Any] = {
            "store_url": PLACE,
            "store_endpoint": store.endpoint,
            "dtype": "fp32",
        }
        # No host memory, and fewer slots than adapters, of all replicas of a cluster together: what
        # is not asked for is on the disk alone.
        budgets: dict[str, Any] = {"slots": 2 if int(ON_CLUSTER or 1) < 3 else 1, "host_bytes": 0}
        root = f"--source-root={sources}"
        with hira(data, root, anew=True, **settings, **budgets) as live:
            made = World(live, store, sources)
            for seed, name in enumerate(("one", "two", "three", "four", "five")):
                assert made.register(name, seed).status_code == 201
                made.check(name)
            yield made
    patch.undo()


def test_the_bytes_are_in_the_store_and_what_is_used_is_on_this_disk(world: World) -> None:
    objects = Objects(PLACE, endpoint=world.store.endpoint)
    there = {name.removesuffix(".tar") for name in objects.listed("versions")}
    objects.close()
    assert world.version("one") in there
    assert not (world.live.folder / "store").exists()
    assert (world.live.folder / "store-cache" / "versions" / world.version("one")).is_dir()
    for line in (
        'hira_store_calls_total{operation="put",outcome="ok"}',
        'hira_store_bytes_total{operation="put"}',
        'hira_store_cache_total{outcome="hit"}',
        'hira_store_seconds_count{operation="put"}',
    ):
        until(partial(lambda one: world.live.metric(one) > 0, line), line)


def test_a_version_that_was_evicted_is_fetched(world: World) -> None:
    world.forget("one")
    for name in ("two", "three", "four"):
        world.check(name)
    world.check("one")
    line = 'hira_store_calls_total{operation="get",outcome="ok"}'
    until(lambda: world.live.metric(line) >= 1)


@pytest.mark.parametrize("how", ["gone", "hung"])
def test_while_the_store_is_away_the_rest_is_answered(world: World, how: str) -> None:
    world.forget(cold := {"gone": "two", "hung": "three"}[how])
    for name in ("four", "five", "one"):
        world.check(name)  # so that the cold one has left its slot
    if how == "gone":
        world.store.kill()
        check_away(world, cold)
        world.store.start()
    else:
        with world.store.hung():
            check_away(world, cold)
    world.back(f"after-{how}")
    until(lambda: world.ask(cold).status_code != 503)
    world.check(cold)


def check_away(world: World, cold: str) -> None:
    for _ in range(6):
        for name in ("four", "five", "one"):
            world.check(name)
    answer = world.ask(cold)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    world.refused("while-away")
    for name in ("four", "five", "one"):
        world.check(name)
    assert world.live.client.get("/health/ready").status_code == 200


def test_a_missing_and_a_changed_object_are_errors_of_their_adapters_alone(world: World) -> None:
    objects = Objects(PLACE, endpoint=world.store.endpoint)
    lost, changed = world.version("two"), world.version("three")
    objects.delete(f"versions/{lost}.tar")
    objects.put(f"versions/{changed}.tar", json.dumps({"no": "archive"}).encode())
    objects.close()
    for name in ("two", "three"):
        cached = world.live.folder / "store-cache" / "versions" / world.version(name)
        cached.rename(world.live.folder / f"lost-{name}")
    for name in ("four", "five", "one"):
        world.check(name)
    told = {name: world.ask(name) for name in ("two", "three")}
    assert (told["two"].status_code, told["two"].json()["code"]) == (404, "adapter_not_found")
    assert (told["three"].status_code, told["three"].json()["code"]) == (422, "corrupt_file")
    for name in ("four", "five", "one"):
        world.check(name)
    for seed, name in ((1, "two"), (2, "three")):
        assert world.register(name, seed).status_code == 200, "nothing moves"
        world.check(name)
