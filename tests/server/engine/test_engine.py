"""The engine as a whole: mixed batches against dense float64, and who fails when something does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.registry.names import Names
from adapters.residency.packed_files import PackedFiles
from server.base.plan import BaseModelError, plan_base
from server.edge.service import Service
from server.engine.engine import Engine, EngineFailure
from server.messages import (
    Cancel,
    EncodeRequest,
    EncodeResult,
    Event,
    Failure,
    GenerateRequest,
    GenerateResult,
    Pin,
    Preload,
    SamplingOptions,
)
from tests.stand import tiny_bases
from tests.stand.engines import LABELS, World, by_id, drain, outputs, preload, world
from tests.stand.fake_server import FakeRegistry
from tests.stand.tiny_bases import Reference, assert_close

__all__ = ["world"]  # the fixture


def test_mixed_batch_equals_each_row_alone_and_dense_float64(world: World) -> None:
    preload(world)
    samples = tiny_bases.texts(12, seed=7)
    requests = [
        world.request("mood", samples[:4], "text-classification", id="mood"),
        world.request("topics", samples[4:8], "text-classification", id="topics"),
        world.request("names", samples[8:], "token-classification", id="names",
                      options={"aggregation_strategy": "none", "ignore_labels": ()}),
        world.request(None, samples[:3], "feature-extraction", id="base"),
        world.request("mood", samples[3:5], "feature-extraction", id="vectors",
                      options={"normalize": False}),
    ]  # fmt: skip
    before = world.engine.snapshot()
    for request in requests:
        world.engine.submit(request)
    first = world.engine.step()
    step = world.engine.last_step
    assert step is not None
    assert (step.lane, step.rows, step.adapters) == ("encode", 17, 3), "all in one batch"
    assert before.queue_depth["encode"] == 0
    mixed = by_id(first)
    assert set(mixed) == {"mood", "topics", "names", "base", "vectors"}

    references = {
        name: Reference(
            world.base,
            world.folders[name],
            "token-classification" if name == "names" else "text-classification",
        )
        for name in world.versions
    }
    bare = Reference(world.base, None, "")
    for request in requests:
        for index, item in enumerate(request.inputs):
            got = outputs(mixed[request.id])[index]
            alone = EncodeRequest(
                "alone", request.task, request.adapter, request.version, (item,),
                options=request.options,
            )  # fmt: skip
            world.engine.submit(alone)
            assert_close(got, outputs(by_id(world.drain())["alone"])[0])
            reference = bare if request.adapter is None else references[request.adapter]
            assert_close(got, expected(request, item, reference))


def expected(request: EncodeRequest, item: Any, reference: Reference) -> Any:
    """What the client should read, from the dense model."""
    if request.task == "feature-extraction":
        model = reference.model if request.adapter is None else reference.model.base_model
        with torch.no_grad():
            hidden = model(torch.tensor([item.token_ids])).last_hidden_state[0]
        vector = hidden.mean(0)
        if request.options.get("normalize", True):
            vector = vector / vector.norm()
        return tuple(vector.tolist())
    logits = reference(item.token_ids).logits[0]
    labels = LABELS[str(request.adapter)]
    scores = logits.sigmoid() if request.adapter == "topics" else logits.softmax(-1)
    if request.task == "text-classification":
        pairs = sorted(zip(scores.tolist(), labels, strict=True), reverse=True)
        return tuple({"label": label, "score": score} for score, label in pairs)
    return tuple(
        {"entity": labels[int(row.argmax())], "score": float(row.max()), "start": span[0]}
        for row, span in zip(scores, item.offsets, strict=True)
        if span[0] != span[1]
    )


def test_adapters_answer_differently_from_each_other_and_the_base(world: World) -> None:
    """Without this the comparison above could pass on adapters that do nothing."""
    kind: Any = "feature-extraction"
    vectors = [
        torch.tensor(outputs_of(world.engine, version, kind))
        for version in (None, *world.versions.values())
    ]
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            assert (one - other).norm() > 0.05


def outputs_of(engine: Engine, version: str | None, task: Any) -> Any:
    return engine.encode(["a very fine film by ann"], task=task, version=version).outputs[0]


def test_rows_of_a_long_request_run_over_several_batches_and_come_back_in_order(
    world: World,
) -> None:
    samples = tiny_bases.texts(150, seed=9)
    world.engine.submit(world.request("mood", samples, "text-classification", id="long"))
    events = world.drain()
    assert len(events) == 1
    got = outputs(events[0])
    for index in (0, 70, 149):
        alone = world.engine.encode(
            [samples[index]], task="text-classification", version=world.versions["mood"]
        )
        assert_close(got[index], alone.outputs[0])
    result = events[0]
    assert isinstance(result, EncodeResult)
    assert result.compute_ms > 0
    assert result.version == world.versions["mood"]


def test_a_version_that_is_not_there_fails_alone(world: World) -> None:
    preload(world)
    world.engine.submit(
        world.request("mood", ["a film"], "text-classification", id="gone", version="0" * 32)
    )
    world.engine.submit(world.request("mood", ["a film"], "text-classification", id="here"))
    ended = by_id(world.drain())
    assert isinstance(ended["here"], EncodeResult)
    assert isinstance(ended["gone"], Failure)
    assert ended["gone"].code == "adapter_not_found"


def test_a_wrong_task_is_named(world: World) -> None:
    with pytest.raises(EngineFailure) as caught:
        world.engine.encode(["a film"], task="token-classification", version=world.versions["mood"])
    failure = caught.value.failure
    assert (failure.code, failure.found, failure.expected) == (
        "task_mismatch",
        "text-classification",
        "token-classification",
    )


def test_a_broken_head_fails_only_its_own_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload(world)
    reader: Any = world.engine._parts.encode._reader
    real = reader._heads.task_head

    def task_head(version: str, weights: Any) -> Any:
        if version == world.versions["topics"]:
            raise RuntimeError("this head is broken")
        return real(version, weights)

    monkeypatch.setattr(reader._heads, "task_head", task_head)
    for name, task in (("mood", "text"), ("topics", "text"), ("names", "token")):
        world.engine.submit(world.request(name, ["a film"], f"{task}-classification", id=name))
    ended = by_id(world.engine.step())
    assert isinstance(ended["mood"], EncodeResult)
    assert isinstance(ended["names"], EncodeResult)
    assert isinstance(ended["topics"], Failure)
    assert ended["topics"].code == "internal"


def test_an_adapter_that_breaks_the_forward_fails_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload(world)
    adapted = world.engine.base.adapted
    slot = world.engine.residency.lease([world.versions["mood"]])[world.versions["mood"]]
    world.engine.residency.release([world.versions["mood"]])
    real = adapted.batch

    def batch(tokens: Any, sequences: Any = None, logits: Any = None) -> Any:
        if slot in tokens.slots:
            raise RuntimeError("this adapter breaks the forward")
        return real(tokens, sequences, logits)

    monkeypatch.setattr(adapted, "batch", batch)
    for name in ("mood", "topics"):
        world.engine.submit(world.request(name, ["a film"], "text-classification", id=name))
    world.engine.submit(world.request(None, ["a film"], "feature-extraction", id="base"))
    ended = by_id(world.engine.step())
    assert isinstance(ended["topics"], EncodeResult)
    assert isinstance(ended["base"], EncodeResult)
    assert isinstance(ended["mood"], Failure)
    monkeypatch.undo()
    snapshot = world.engine.residency._tiers.entries
    assert all(entry.leases == 0 for entry in snapshot.values()), "every lease was given back"


def test_a_deadline_that_passes_is_a_failure_and_a_cancel_is_silent(world: World) -> None:
    preload(world)
    samples = tiny_bases.texts(3, seed=3)
    world.engine.submit(
        world.request(
            "mood", samples, "text-classification", id="late", deadline=time.monotonic() - 1
        )
    )
    world.engine.submit(world.request("mood", samples, "text-classification", id="left"))
    world.engine.submit(Cancel("left"))
    world.engine.submit(Cancel("never came"))
    ended = by_id(world.drain())
    assert set(ended) == {"late"}
    failure = ended["late"]
    assert isinstance(failure, Failure)
    assert failure.code == "deadline_exceeded"


def test_a_request_waiting_for_a_slow_load_does_not_hold_up_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that is slow enough has packed it by now.
    monkeypatch.setattr(PackedFiles, "read", lambda *_: None)
    preload(world)
    residency = world.engine.residency
    loads = residency._load
    let_go = threading.Event()

    def slow(version: str) -> Any:
        assert let_go.wait(60)
        return loads(version)

    residency.drop(world.versions["names"])
    residency._load = slow
    try:
        world.engine.submit(world.request("names", ["ann"], "token-classification", id="slow"))
        world.engine.submit(world.request("mood", ["a film"], "text-classification", id="quick"))
        assert set(by_id(world.engine.step())) == {"quick"}
        assert not world.engine.has_work()
        let_go.set()
        assert set(by_id(world.drain())) == {"slow"}
    finally:
        let_go.set()
        residency._load = loads


def until_tiers(engine: Engine, tiers: set[str]) -> None:
    end = time.monotonic() + 60
    while set(engine.snapshot().residency) != tiers:
        assert time.monotonic() < end, engine.snapshot().residency
        engine.wait(0.05)


def test_a_version_that_lost_its_name_leaves_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.engine
    monkeypatch.setattr(engine._names, "spare_s", 0.0)
    monkeypatch.setattr(engine._names, "named", None)
    preload(world)
    for name, task in (("mood", "text"), ("topics", "text"), ("names", "token")):
        kind: Any = f"{task}-classification"
        engine.encode(["a film"], task=kind, version=world.versions[name])
    before = engine.snapshot().adapter_bytes
    named = (world.versions["mood"], world.versions["names"])
    engine.submit(Pin(()))
    assert set(world.versions.values()) <= set(engine.snapshot().residency), "nothing was said"

    # It is asked for: it stays until that is answered.
    engine.submit(world.request("topics", ["a film"], "text-classification", id="last"))
    engine.submit(Pin((), named=named))
    assert set(engine.snapshot().residency) == set(world.versions.values())
    assert isinstance(by_id(world.drain())["last"], EncodeResult)
    until_tiers(engine, set(named))
    after = engine.snapshot().adapter_bytes
    assert after["device"] < before["device"]
    assert after["heads"] < before["heads"]
    assert engine.snapshot().slots["used"] == 2

    # A request that was admitted before the name went is answered, and leaves nothing behind.
    engine.encode(["a film"], task="text-classification", version=world.versions["topics"])
    until_tiers(engine, set(named))


def test_a_version_asked_for_just_now_waits_for_its_name(world: World) -> None:
    engine = world.engine
    engine.submit(Preload(world.versions["mood"]))
    engine.submit(Pin((), named=()))
    assert world.versions["mood"] in engine.snapshot().residency
    engine._names.named = None


def test_the_worker_is_told_of_every_name() -> None:
    registry: Any = FakeRegistry()
    names = Names(registry, lambda: 0)
    names.refresh()
    service: Any = SimpleNamespace(names=names)
    assert Service._known_versions(service) == Pin((), named=("imdb-v1", "story-v1"))


def test_a_generating_version_without_a_name_ends_its_answer(tmp_path: Path) -> None:
    base, store = tiny_bases.base_folder(tmp_path, "llama"), tmp_path / "store"
    folder = tiny_bases.adapter(tmp_path / "tale", base, "text-classification", seed=5)
    version = tiny_bases.stored(store, folder)
    engine = Engine.build(tiny_bases.options(base, store))
    engine._names.spare_s = 0.0
    sampling = SamplingOptions(max_new_tokens=6, ignore_eos=True)
    ids = engine.text.tokenize_prompt("a film")
    engine.submit(GenerateRequest("g", "tale", version, ids, sampling))
    engine.submit(Pin((), named=()))
    while not engine.has_work():
        engine.wait(0.05)
    engine.step()
    engine.submit(Pin((), named=()))
    assert set(engine.snapshot().residency) == {version}
    assert isinstance(by_id(drain(engine))["g"], GenerateResult)
    until_tiers(engine, set())
    assert engine.snapshot().adapter_bytes["device"] == 0
    engine.close()


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_a_cache_that_holds_nothing_is_refused_before_the_weights_are_read(
    tmp_path: Path, dtype: str
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    with pytest.raises(BaseModelError, match="KV cache") as caught:
        plan_base(tiny_bases.options(base, tmp_path, kv_bytes=10, dtype=dtype))
    assert caught.value.found == "10 bytes"
    assert caught.value.expected
    assert "--kv-bytes" in str(caught.value.fix)


def test_an_encoder_fills_masks_and_refuses_to_generate(world: World) -> None:
    result = world.engine.encode(["a [MASK] film"], task="fill-mask", top_k=3)
    words = result.outputs[0]
    assert len(words) == 3
    assert words[0]["score"] >= words[1]["score"]
    from transformers import AutoModelForMaskedLM

    model: Any = AutoModelForMaskedLM.from_pretrained(world.base, dtype=torch.float64).eval()
    ids = world.engine.text.tokenize(["a [MASK] film"], "fill-mask")[0].token_ids
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, 2].softmax(-1)
    best = scores.topk(3)
    assert [word["token"] for word in words] == best.indices.tolist()
    assert_close([word["score"] for word in words], best.values.tolist())
    with pytest.raises(EngineFailure, match="task_mismatch"):
        world.engine.generate("a film")


def test_closing_fails_what_still_waits(tmp_path: Path) -> None:
    base = tiny_bases.base_folder(tmp_path, "distilbert")
    engine = Engine.build(tiny_bases.options(base, tmp_path / "store"))
    kind: Any = "feature-extraction"
    engine.submit(EncodeRequest("r", kind, None, None, engine.text.tokenize(["a film"], kind)))
    events = engine.close()
    assert [(e.id, e.code) for e in events if isinstance(e, Failure)] == [("r", "draining")]


def test_a_decoder_generates_and_classifies_in_turns(tmp_path: Path) -> None:
    base, store = tiny_bases.base_folder(tmp_path, "llama"), tmp_path / "store"
    folder = tiny_bases.adapter(
        tmp_path / "mood", base, "text-classification", labels=LABELS["mood"], seed=5
    )
    version = tiny_bases.stored(store, folder)
    engine = Engine.build(tiny_bases.options(base, store))
    samples = tiny_bases.texts(20, seed=4)
    kind: Any = "text-classification"
    engine.encode(samples[:1], task=kind, version=version)
    inputs = engine.text.tokenize(samples, kind)
    for index, item in enumerate(inputs):
        engine.submit(EncodeRequest(f"e{index}", kind, "mood", version, (item,) * 40))
    sampling = SamplingOptions(max_new_tokens=6, ignore_eos=True)
    engine.submit(GenerateRequest("g", None, None, engine.text.tokenize_prompt("a film"), sampling))
    lanes = []
    ended: list[Event] = []
    waits_s: dict[str, list[float]] = {"encode": [], "generate": []}
    while engine.has_work():
        ended += engine.step()
        step = engine.last_step
        assert step is not None
        lanes.append(step.lane)
        waits_s[step.lane] += step.waits_s
    answers = [one for one in ended if isinstance(one, EncodeResult | GenerateResult)]
    told = {
        "encode": [one.queue_ms / 1000 for one in answers if isinstance(one, EncodeResult)],
        "generate": [one.queue_ms / 1000 for one in answers if isinstance(one, GenerateResult)],
    }
    for lane, waits in waits_s.items():
        assert sorted(waits) == pytest.approx(sorted(told[lane])), "each request's, once"
    totals = engine.snapshot().totals
    assert (totals["miss"], totals["hit"]) == (1, len(inputs)), "the first had to be loaded"
    assert len(engine.take_load_seconds()) == 1
    assert lanes[:8].count("generate") == 4, "the lanes take turns"
    results = by_id(ended)
    assert isinstance(results["g"], GenerateResult)
    assert len(results["g"].tokens) == 6
    reference = Reference(base, folder, kind)
    for index, item in enumerate(inputs):
        scores = reference(item.token_ids).logits[0].softmax(-1)
        got = {one["label"]: one["score"] for one in outputs(results[f"e{index}"])[0]}
        for label, score in zip(LABELS["mood"], scores.tolist(), strict=True):
            assert got[label] == pytest.approx(score, abs=2e-5)
    engine.close()
