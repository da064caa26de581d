"""Storage that fails under a running server: registry locked or damaged, disk full, files lost.

With the real engine and the demo, whose answers are known: whatever fails, they stay the same.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.stand.live import Live, hira
from tests.stand.made import make_adapter

pytestmark = pytest.mark.http

SMALL = "48m"  # enough for the demo and a few adapters
TOLERANCE = 1e-5  # strategies that are timed in turn sum in another order


@dataclass
class World:
    """A server whose data may be on a disk of its own, and what it answered when all was well."""

    live: Live
    disk: Path
    is_small: bool  # the disk can be filled without harm to others
    sources: Path
    known: dict[str, float]

    def ask(self, name: str = "hira-imdb") -> httpx2.Response:
        return self.live.client.post(
            f"/predict?adapter={name}", json={"inputs": "A fine film, warmly played."}
        )

    def register(self, name: str, seed: int) -> httpx2.Response:
        folder = self.sources / f"{name}-{seed}"
        if not folder.exists():
            make_adapter(folder, seed=seed, labels=("LOW", "HIGH"))
        body = {"name": name, "source": str(folder), "replace": True}
        return self.live.client.post("/admin/adapters", json=body, headers=self.live.admin)

    def check_others(self) -> None:
        """The demo's adapter answers as it always did."""
        answer = self.ask()
        assert answer.status_code == 200
        assert scores_of(answer) == pytest.approx(self.known, abs=TOLERANCE)


def scores_of(answer: httpx2.Response) -> dict[str, float]:
    return {one["label"]: one["score"] for one in answer.json()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    disk, sources = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("sources")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "none", str(disk)]
    is_small = os.geteuid() == 0 and not subprocess.call(mount, stderr=subprocess.DEVNULL)
    try:
        with hira(disk / "data", f"--source-root={sources}", dtype="fp32") as live:
            world = World(live, disk, is_small, sources, {})
            world.known = scores_of(world.ask())
            yield world
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_locked_registry_refuses_changes_and_goes_on_answering(world: World) -> None:
    registry = world.live.folder / "registry.sqlite"
    with closing(sqlite3.connect(registry, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        refused = world.register("while-locked", 1)
        assert time.monotonic() - began < 60  # it is waited for five seconds
        assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
        assert "locked" in refused.json()["found"]
        assert int(refused.headers["Retry-After"]) >= 1
        world.check_others()
        other.execute("ROLLBACK")
    assert world.register("while-locked", 1).status_code == 201
    assert world.ask("while-locked").status_code == 200


def test_files_deleted_under_the_server_are_an_error_and_never_another_answer(world: World) -> None:
    version = world.register("deleted", 2).json()["version"]
    shutil.rmtree(world.live.folder / "store" / "versions" / version)
    answer = world.ask("deleted")
    assert answer.status_code in {404, 422, 500}
    assert answer.json()["code"] in {"adapter_not_found", "corrupt_file"}
    assert "X-Adapter-Version" not in answer.headers
    world.check_others()
    again = world.register("deleted", 2)  # what the error tells people to do
    assert again.status_code in {200, 201}
    healed = world.ask("deleted")
    assert healed.status_code == 200
    assert healed.headers["X-Adapter-Version"] == version


def test_files_damaged_under_the_server_are_an_error_and_never_another_answer(world: World) -> None:
    version = world.register("damaged", 3).json()["version"]
    tensors = world.live.folder / "store" / "versions" / version / "adapter_model.safetensors"
    tensors.chmod(0o600)
    with tensors.open("r+b") as file:  # in the middle of a tensor: the header is still right
        file.seek(tensors.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))
    answer = world.ask("damaged")
    assert (answer.status_code, answer.json()["code"]) == (422, "corrupt_file")
    world.check_others()
    assert world.register("damaged", 3).status_code in {200, 201}
    assert world.ask("damaged").status_code == 200


def test_full_disk_refuses_adapters_and_serves_on(world: World) -> None:
    if not world.is_small:
        pytest.skip("a disk to fill needs the right to mount a tmpfs")
    before = {one.pid for one in world.live.processes()}
    with pytest.raises(OSError, match="No space left"):
        fill(world.disk / "ballast")
    for _ in range(3):  # also adapters and endpoints that no metric knows yet
        world.check_others()
        assert world.ask("lora-agnews").status_code == 200
        text = world.live.client.post("/generate?adapter=hira-wiki", json={"inputs": "The king"})
        assert text.status_code == 200
        assert world.live.client.get("/metrics").status_code == 200
    refused = world.register("no-room", 4)
    assert refused.status_code == 507
    assert refused.json()["code"] in {"audit_unwritable", "store_full"}
    time.sleep(5.5)  # longer than a worker may be silent
    assert world.live.client.get("/health/ready").status_code == 200
    assert {one.pid for one in world.live.processes()} == before, "a process died"
    (world.disk / "ballast").unlink()
    assert world.register("no-room", 4).status_code == 201
    assert world.ask("no-room").status_code == 200


def fill(path: Path) -> None:
    ballast = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(ballast, bytes(4096))
    finally:
        os.close(ballast)


def test_damaged_registry_is_an_error_and_never_another_answer(world: World) -> None:
    # The last of this module: the database is beyond repair afterwards.
    for path in world.live.folder.glob("registry.sqlite*"):
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))
    for _ in range(20):
        answer = world.ask()
        if answer.status_code == 200:  # from what is known for certain to be current
            assert scores_of(answer) == pytest.approx(world.known, abs=TOLERANCE)
        else:
            assert (answer.status_code, answer.json()["code"]) == (503, "registry_unavailable")
        time.sleep(0.1)
    refused = world.register("on-ruins", 5)
    assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
    assert world.live.client.get("/health/live").status_code == 200
