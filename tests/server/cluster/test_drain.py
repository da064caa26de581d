"""HTTP replicas of one machine drain when they are told, and what is left is waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.cluster import drain as draining
from server.cluster.drain import drain, follow_phase
from server.edge.admit.shared_load import Phase, SharedLoad
from tests.stand.waits import until


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "PHASE_LOOK_S", 0.005)
    monkeypatch.setattr(draining, "ENDED_AFTER_S", 0.0)


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
    yield
    loop.call_soon_threadsafe(task.cancel)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


def test_all_replicas_drain_and_the_last_request_is_waited_for(tmp_path: Path) -> None:
    loads = [SharedLoad(1), SharedLoad(1)]
    loads[1].set(0, requests=1, tokens=1)
    with following(tmp_path, loads):
        ended = threading.Thread(target=drain, args=(tmp_path, 2, 60.0))
        ended.start()
        until(lambda: [one.phase for one in loads] == [Phase.DRAINING] * 2)
        until(lambda: len(list(tmp_path.glob("*.left"))) == 2)
        assert ended.is_alive()
        loads[1].set(0, requests=0, tokens=0)
        ended.join(60)
        assert not ended.is_alive()
        until(lambda: [one.phase for one in loads] == [Phase.STOPPING] * 2)


def test_what_is_left_after_the_time_is_ended(tmp_path: Path) -> None:
    load = SharedLoad(1)
    load.set(0, requests=1, tokens=1)
    with following(tmp_path, [load]):
        drain(tmp_path, 1, 0.05)
        until(lambda: load.phase is Phase.STOPPING)


def test_a_replica_that_died_is_not_waited_for_longer(tmp_path: Path) -> None:
    drain(tmp_path, 1, 0.05)
    assert (tmp_path / draining.PHASE_FILE).read_text() == "STOPPING"
