"""An adapter that keeps failing, in the real engine: shut out alone, visibly, and let in again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from server.demo import ADAPTERS_DIR
from server.engine.engine import Engine
from server.engine.snapshot import FailureTracker
from server.errors import Refusal
from server.messages import EncodeRequest, EncodeResult, Event, Failure, ReleaseQuarantine
from tests.stand import tiny_bases
from tests.stand.engines import World, by_id, outputs, preload, world
from tests.stand.live import hira
from tests.stand.waits import until

__all__ = ["world"]  # the fixture


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Make the heads of one version raise."""
    reader: Any = engine._parts.encode._reader
    read_all = reader.read_all

    def broken(groups: Any) -> list[list[Any]]:
        found: list[list[Any]] = read_all(groups)
        for (group, _), answers in zip(groups, found, strict=True):
            if group.version == version:
                answers[:] = [RuntimeError("a head of stone")] * len(answers)
        return found

    monkeypatch.setattr(reader, "read_all", broken)


def test_adapter_that_keeps_failing_is_quarantined_alone_until_it_is_lifted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload(world)
    engine, bad = world.engine, world.versions["mood"]
    sample = tiny_bases.texts(1, seed=3)

    def ask(adapter: str, number: int) -> Event:
        engine.submit(
            world.request(adapter, sample, "text-classification", id=f"{adapter}-{number}")
        )
        return by_id(world.drain())[f"{adapter}-{number}"]

    good = outputs(ask("mood", 0))
    before = engine.snapshot().totals["quarantine"]
    with monkeypatch.context() as patch:
        failing(engine, patch, bad)
        for number in range(1, 6):
            event = ask("mood", number)
            assert isinstance(event, Failure)
            assert event.code == "internal"
            outputs(ask("topics", number))
    event = ask("mood", 10)  # its head would work again, but nobody has said so
    assert isinstance(event, Failure)
    assert event.code == "adapter_quarantined"
    assert "a head of stone" not in (event.message + str(event.fix))
    assert 0 < (event.retry_after_s or 0) <= 60
    assert Refusal.of(event).headers["Retry-After"] == str(event.retry_after_s)
    snapshot = engine.snapshot()
    assert set(snapshot.quarantined) == {bad}
    assert snapshot.quarantined[bad][0] > time.time()
    assert snapshot.totals["quarantine"] == before + 1
    outputs(ask("topics", 10))
    engine.submit(ReleaseQuarantine(bad))
    assert engine.snapshot().quarantined == {}
    assert outputs(ask("mood", 11)) == good


def test_what_the_bare_base_fails_at_is_no_fault_of_the_adapter(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload(world)
    engine, sample = world.engine, tiny_bases.texts(1, seed=3)

    def ask(number: int) -> Event:
        request = world.request("mood", sample, "text-classification", id=f"base-{number}")
        engine.submit(request)
        return by_id(world.drain())[f"base-{number}"]

    def fails(**given: Any) -> Any:
        raise RuntimeError("a base of stone")

    real = engine.base.backbone.forward

    def overflows(**given: Any) -> Any:
        out = real(**given)
        for states in (out.last_hidden_state, getattr(out, "pooler_output", None)):
            if states is not None:
                states.fill_(float("nan"))
        return out

    for fault, message in ((fails, "a base of stone"), (overflows, "NaN")):
        with monkeypatch.context() as patch:
            patch.setattr(engine.base.backbone, "forward", fault)
            for number in range(8):
                event = ask(number)
                assert isinstance(event, Failure)
                assert (event.code, message in str(event.found)) == ("base_failed", True), event
    assert engine.snapshot().quarantined == {}
    outputs(ask(9))


def tracker_of(*requests: str) -> FailureTracker:
    """Of which these requests of one version run; three failures in a row are too many."""
    tracker = FailureTracker(3, 60.0)
    for request in requests:
        assert tracker.admit(running(request)) is None
    return tracker


def running(request: str) -> EncodeRequest:
    return EncodeRequest(request, "feature-extraction", "mood", "v", ())


def test_one_fault_that_many_requests_share_is_one_failure() -> None:
    tracker = tracker_of(*"abcdefg")
    tracker.note([Failure(one, "internal", "The forward failed.") for one in "abcde"])
    assert tracker.quarantined() == {}
    tracker.note([Failure("f", "internal", "The forward failed.")])
    assert tracker.quarantined() == {}
    tracker.note([Failure("g", "internal", "The forward failed.")])
    assert set(tracker.quarantined()) == {"v"}


def test_a_version_that_answers_in_the_same_step_has_not_failed() -> None:
    tracker = tracker_of(*"abcdef")
    for good, bad in ("ab", "cd", "ef"):
        result = EncodeResult(good, ((0.0,),), "v", 1, 0.0, 0.0)
        tracker.note([result, Failure(bad, "internal", "The forward failed.")])
    assert tracker.quarantined() == {}


@pytest.mark.http
def test_quarantine_is_visible_over_http_and_lifted_by_a_patch(tmp_path: Path) -> None:
    folder = ADAPTERS_DIR / "hira-imdb"
    tensors = load_file(folder / "adapter_model.safetensors")
    wild = {
        name: tensor * 1e15 if "lora_" in name or "hira_" in name else tensor
        for name, tensor in tensors.items()
    }
    files = [
        ("files", (name, (folder / name).read_bytes()))
        for name in ("adapter_config.json", "config.json")
    ]
    files.append(("files", ("adapter_model.safetensors", save(wild))))
    with hira(tmp_path / "data", quarantine_failures=3) as live:

        def ask(adapter: str) -> tuple[int, str]:
            answer = live.client.post(f"/predict?adapter={adapter}", json={"inputs": "A film."})
            return answer.status_code, answer.json()["code"] if answer.is_error else "fine"

        def record() -> Any:
            return live.client.get("/admin/adapters/wild", headers=live.admin).json()

        added = live.client.post(
            "/admin/adapters", data={"name": "wild"}, files=files, headers=live.admin
        )
        assert added.status_code == 201, added.text
        assert added.json()["quarantined_until"] is None
        for _ in range(3):
            assert ask("wild") == (500, "adapter_failed")
            assert ask("hira-sst2") == (200, "fine")
        refused = live.client.post("/predict?adapter=wild", json={"inputs": "A film."})
        assert refused.json()["code"] == "adapter_quarantined"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        until(lambda: record()["quarantined_until"] is not None)
        assert "adapter_failed" in record()["quarantine_reason"]
        assert live.metric('hira_adapters{state="quarantined"}') == 1
        assert live.metric('hira_failures_total{adapter="wild",code="adapter_quarantined"}') == 1
        live.client.patch("/admin/adapters/wild", json={"pinned": False}, headers=live.admin)
        until(lambda: ask("wild") == (500, "adapter_failed"))
        assert ask("hira-sst2") == (200, "fine")
