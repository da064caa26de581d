"""HTTP replicas of one machine drain when they are told, and what is left is waited for."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from server.cluster import drain as draining
from server.cluster.drain import drain, follow_phase
from server.cluster.metric_files import is_held
from server.edge.admit.shared_load import Phase, SharedLoad
from server.edge.processes.run_folder import run_folder
from tests.stand.waits import until


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "PHASE_LOOK_S", 0.005)
    monkeypatch.setattr(draining, "ENDED_AFTER_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The run folder of a cluster that lives."""
    with run_folder(tmp_path / "run", 0):
        (tmp_path / "run" / "metrics").mkdir()
        yield tmp_path / "run"


@contextmanager
def living(folder: Path, number: int) -> Iterator[None]:
    """The lock by which an HTTP replica says that it lives."""
    lock = os.open(folder / "metrics" / f"http-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def following(folder: Path, loads: list[SharedLoad]) -> Iterator[None]:
    """HTTP replicas, as far as this goes."""

    async def follow_all() -> None:
        names = (f"http-{number}" for number in range(len(loads)))
        await asyncio.gather(*map(follow_phase, [folder] * len(loads), names, loads))

    loop = asyncio.new_event_loop()
    task = loop.create_task(follow_all())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with ExitStack() as locks:
            for number in range(len(loads)):
                locks.enter_context(living(folder, number))
            yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


def test_all_replicas_drain_and_the_last_request_is_waited_for(folder: Path) -> None:
    loads = [SharedLoad(1), SharedLoad(1)]
    loads[1].set(0, requests=1, tokens=1)
    with following(folder, loads):
        ended = threading.Thread(target=drain, args=(folder, folder / "metrics", 60.0), daemon=True)
        ended.start()
        until(lambda: [one.phase for one in loads] == [Phase.DRAINING] * 2)
        until(lambda: len(list(folder.glob("*.left"))) == 2)
        assert ended.is_alive()
        loads[1].set(0, requests=0, tokens=0)
        ended.join(30)
        assert not ended.is_alive()
        until(lambda: [one.phase for one in loads] == [Phase.STOPPING] * 2)


def test_what_is_left_after_the_time_is_ended(folder: Path) -> None:
    load = SharedLoad(1)
    load.set(0, requests=1, tokens=1)
    with following(folder, [load]):
        drain(folder, folder / "metrics", 0.05)
        until(lambda: load.phase is Phase.STOPPING)


def test_a_replica_that_died_is_not_waited_for_whatever_it_had(folder: Path) -> None:
    with living(folder, 1):
        pass
    (folder / "http-1.left").write_text("3")
    with following(folder, [SharedLoad(1)]):
        ended = threading.Thread(
            target=drain, args=(folder, folder / "metrics", 600.0), daemon=True
        )
        ended.start()
        ended.join(30)
        assert not ended.is_alive()
    assert (folder / draining.PHASE_FILE).read_text() == "STOPPING"


def test_a_replica_that_has_not_spoken_is_waited_for_until_the_time_is_over(folder: Path) -> None:
    with living(folder, 0):
        ended = threading.Thread(target=drain, args=(folder, folder / "metrics", 0.2), daemon=True)
        ended.start()
        ended.join(30)
        assert not ended.is_alive()
    assert (folder / draining.PHASE_FILE).read_text() == "STOPPING"


def test_what_a_cluster_that_was_killed_left_has_no_later_one_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_folder(tmp_path / "run", 0):
        left = {one.name: one.read_bytes() for one in (tmp_path / "run").iterdir()}
    folder = tmp_path / "left"
    (folder / "metrics").mkdir(parents=True)
    for name, content in left.items():
        (folder / name).write_bytes(content)
    (folder / draining.PHASE_FILE).write_text("DRAINING")
    load, looks = SharedLoad(1), Looks()
    monkeypatch.setattr(draining, "is_held", looks.counted(is_held))
    with following(folder, [load]):
        until(lambda: looks.count > 3)
    assert load.phase is Phase.SERVING


class Looks:
    """Counts how often something is asked."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, ask: Callable[[Path], bool]) -> Callable[[Path], bool]:
        def asked(path: Path) -> bool:
            self.count += 1
            return ask(path)

        return asked

    def __getitem__(self, name: str) -> Phase:
        """In place of ``Phase``."""
        self.count += 1
        return Phase[name]


def test_a_phase_that_cannot_be_read_is_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / draining.PHASE_FILE).mkdir()
    load, looks = SharedLoad(1), Looks()
    monkeypatch.setattr(draining, "Phase", looks)
    with caplog.at_level(logging.WARNING), following(folder, [load]):
        until(lambda: caplog.records)
        (folder / draining.PHASE_FILE).rmdir()
        (folder / draining.PHASE_FILE).write_text("no phase")
        until(lambda: looks.count > 3)
        (folder / draining.PHASE_FILE).write_text("DRAINING")
        until(lambda: load.phase is Phase.DRAINING)
    (record,) = caplog.records
    assert "IsADirectoryError" in record.getMessage()
