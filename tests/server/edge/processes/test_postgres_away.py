"""A registry in PostgreSQL, and what goes on while that is down or says nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from tests.stand import postgres
from tests.stand.live import Live, hira
from tests.stand.made import make_adapter

MISSING = postgres.why_not()
pytestmark = [pytest.mark.http, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

PATIENCE_S = 120.0
AWAY_S = 6.0  # several readings of the registry long


@dataclass
class World:
    """A server on a PostgreSQL of its own, and what it answers when all is well."""

    live: Live
    database: postgres.Postgres
    sources: Path
    known: dict[str, float] = field(default_factory=dict)

    def ask(self, name: str = "hira-imdb") -> httpx2.Response:
        body = {"inputs": "A fine film, warmly played."}
        return self.live.client.post(f"/predict?adapter={name}", json=body)

    def scores(self) -> dict[str, float]:
        answer = self.ask()
        assert answer.status_code == 200, answer.text
        return {one["label"]: one["score"] for one in answer.json()}

    def register(self, name: str, seed: int) -> httpx2.Response:
        folder = self.sources / f"{name}-{seed}"
        if not folder.exists():
            make_adapter(folder, seed=seed, labels=("LOW", "HIGH"))
        body = {"name": name, "source": str(folder), "replace": True}
        return self.live.client.post("/admin/adapters", json=body, headers=self.live.admin)

    def check_away(self, name: str) -> None:
        """Answers go on, and changes are refused with a time to come back."""
        until = time.monotonic() + AWAY_S
        while time.monotonic() < until:
            assert self.scores() == pytest.approx(self.known, abs=1e-4)
        refused = self.register(name, 1)
        assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        assert self.scores() == pytest.approx(self.known, abs=1e-4)
        assert self.live.client.get("/health/ready").status_code == 200

    def check_back(self, name: str) -> None:
        """Changes are taken again, and asked for at once."""
        until = time.monotonic() + PATIENCE_S
        while (answer := self.register(name, 1)).status_code == 503:
            assert time.monotonic() < until, answer.text
            time.sleep(0.2)
        assert answer.status_code == 201, answer.text
        assert self.ask(name).status_code == 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    sources = tmp_path_factory.mktemp("sources")
    with postgres.postgres() as database:
        data = tmp_path_factory.mktemp("served") / "data"
        root = f"--source-root={sources}"
        with hira(data, root, registry_url=database.url, dtype="fp32", anew=True) as live:
            made = World(live, database, sources)
            made.known = made.scores()
            yield made


def test_database_that_is_down_for_seconds_stops_no_answer(world: World) -> None:
    assert world.register("before", 1).status_code == 201
    assert world.ask("before").status_code == 200  # from here on the change is known in memory
    world.database.stop()
    world.check_away("while-down")
    assert world.ask("before").status_code == 200
    unknown = world.ask("nobody-knows")
    assert (unknown.status_code, unknown.json()["code"]) == (503, "registry_unavailable")
    world.database.start()
    world.check_back("while-down")


def test_database_that_hangs_stops_no_answer(world: World) -> None:
    with world.database.hung():
        world.check_away("while-hung")
    world.check_back("while-hung")
    assert world.live.child.poll() is None
