"""A replica of the engine without Ray: requests in, events out, and what it says of itself."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from server.cluster.engine_thread import EngineThread
from server.cluster.replica import Addressed, EngineReplica, ReplicaPlan
from server.messages import (
    TERMINAL,
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    GenerateResult,
    SamplingOptions,
    TokenEvent,
    TokenizedInput,
)
from server.options import EngineOptions
from tests.stand.fake_engine import FakeEngine


def plan_in(tmp_path: Path) -> ReplicaPlan:
    return ReplicaPlan(
        engine="tests.stand.fake_engine:build",
        options=EngineOptions(base="none", store_dir=tmp_path / "store", cache_dir=tmp_path),
        database=f"sqlite:///{tmp_path / 'registry.sqlite'}",
        base_digest="",
        max_step_s=0.5,
        metrics_dir=tmp_path / "metrics",
        log_level="warning",
    )


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[EngineReplica]:
    made = EngineReplica(plan_in(tmp_path), "one")
    yield made
    made.close()


def encode_request(number: int = 0, **more: Any) -> EncodeRequest:
    inputs = (TokenizedInput((1, 2)),)
    return EncodeRequest(f"e{number}", "text-classification", "imdb", "v1", inputs, **more)


def generate_request(tokens: int) -> GenerateRequest:
    sampling = SamplingOptions(max_new_tokens=tokens)
    return GenerateRequest("g", "story", "v2", (1, 2, 3), sampling, stream=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_requests_of_many_are_answered_each_by_its_own(replica: EngineReplica) -> None:
    async def scenario() -> None:
        found = await asyncio.gather(
            *(replica.answer(encode_request(number), 0.0, 5.0) for number in range(20))
        )
        assert [one.id for one in found] == [f"e{number}" for number in range(20)]
        assert all(isinstance(one, EncodeResult) for one in found)

    run(scenario())


def test_a_stream_has_every_token_in_order_and_one_end(replica: EngineReplica) -> None:
    async def scenario() -> None:
        events = [
            event
            async for batch in replica.stream(generate_request(7), 0.0, None)
            for event in batch
        ]
        tokens = [one.token_id for one in events if isinstance(one, TokenEvent)]
        assert tokens == list(range(7))
        assert [one for one in events if isinstance(one, TERMINAL)] == events[-1:]
        assert isinstance(events[-1], GenerateResult)
        assert events[-1].version == "v2"

    run(scenario())


def test_who_leaves_before_the_end_has_the_work_cancelled(replica: EngineReplica) -> None:
    async def scenario() -> None:
        async with aclosing(replica.stream(generate_request(10_000), 0.0, None)) as batches:
            await anext(batches)
        for _ in range(100):
            if (await replica.state(Addressed()))["snapshot"]["adapters"] == {"cancelled": 1}:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the work goes on")

    run(scenario())


def test_times_are_counted_by_the_clock_of_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EncodeRequest] = []

    class Recorder(FakeEngine):
        def submit(self, message: Any) -> None:
            if isinstance(message, EncodeRequest):
                seen.append(message)
            super().submit(message)

    monkeypatch.setattr("server.cluster.replica.build_engine", lambda _, options: Recorder(options))
    replica = EngineReplica(plan_in(tmp_path), "one")
    before = time.monotonic()

    async def scenario() -> None:
        request = encode_request(submitted=before + 1e6, deadline=before + 1e6)
        await replica.answer(request, 2.0, 3.0)

    run(scenario())
    replica.close()
    (request,) = seen
    assert request.deadline is not None
    assert before - 2.0 <= request.submitted <= time.monotonic() - 2.0
    assert before + 3.0 <= request.deadline <= time.monotonic() + 3.0


def test_health_fails_where_a_step_hangs(replica: EngineReplica) -> None:
    replica.check_health()

    async def scenario() -> None:
        request = encode_request(top_k=502)
        waiting = asyncio.create_task(replica.answer(request, 0.0, None))
        await asyncio.sleep(1.0)
        with pytest.raises(RuntimeError, match="one step"):
            replica.check_health()
        waiting.cancel()

    run(scenario())


def test_an_engine_that_raises_ends_its_replica() -> None:
    ends: list[bool] = []
    engine: Any = FakeEngine(EngineOptions(base="none", store_dir=Path("s"), cache_dir=Path("c")))
    thread = EngineThread(engine, lambda events: None, lambda: ends.append(True))
    thread.submit(encode_request(top_k=501))
    for _ in range(100):
        if ends:
            break
        time.sleep(0.05)
    assert ends == [True]
    assert not thread.lives


def test_routers_are_told_the_short_names_of_what_is_on_the_device(replica: EngineReplica) -> None:
    assert replica.record_routing_stats() == {"resident": []}


def break_in_a_child(folder: Path, port: int) -> None:
    """A replica with a connection whose engine breaks, and whose threads take long to end."""
    setattr(os, "_exit", lambda status: time.sleep(3600))  # noqa: B010
    held = socket.create_connection(("127.0.0.1", port))
    made = EngineReplica(plan_in(folder), "one")
    asyncio.run(made.answer(encode_request(top_k=501), 0.0, None))
    held.close()


def test_whoever_is_connected_is_told_before_the_last_thread_has_ended(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = multiprocessing.get_context("spawn").Process(
            target=break_in_a_child, args=(tmp_path, port), daemon=True
        )
        child.start()
        connection, _ = server.accept()
        connection.settimeout(60)
        try:
            assert connection.recv(1) == b""
            assert child.is_alive()
        finally:
            connection.close()
            child.kill()
            child.join()
