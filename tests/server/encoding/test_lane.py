"""The encode lane by itself: what it refuses, how it pads, and that it gives everything back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.messages import EncodeRequest, EncodeResult, Event, Failure, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    tasks = {"cls": "text-classification", "ner": "token-classification",
             "qa": "question-answering", "bad": "text-classification"}  # fmt: skip
    lane = Lane(tmp_path_factory.mktemp("lane"), "distilbert", tasks)
    yield lane
    lane.residency.close()


def only(events: dict[str, Event]) -> Failure:
    (event,) = events.values()
    assert isinstance(event, Failure), event
    return event


def made(*ids: int, **more: Any) -> tuple[TokenizedInput, ...]:
    return (TokenizedInput(tuple(ids), **more),)


@pytest.mark.parametrize(
    ("task", "version", "inputs", "code"),
    [
        ("text-classification", None, made(2, 3), "task_mismatch"),
        ("text-generation", None, made(2, 3), "task_mismatch"),
        ("image-classification", "cls", made(2, 3), "task_mismatch"),
        ("text-classification", "ner", made(2, 3), "task_mismatch"),
        ("text-classification", "cls", (), "invalid_input"),
        ("text-classification", "cls", made(), "invalid_input"),
        ("text-classification", "cls", made(2, -1), "invalid_input"),
        ("text-classification", "cls", made(2, tiny_bases.VOCABULARY), "invalid_input"),
        ("text-classification", "cls", made(*[5] * 49), "invalid_input"),
    ],
)
def test_a_request_that_can_never_run_is_answered_with_the_reason(
    shared: Lane, task: Any, version: str | None, inputs: Any, code: str
) -> None:
    shared.lane.submit(EncodeRequest("r", task, version, version, inputs))
    failure = only(shared.drain())
    assert failure.code == code
    assert failure.message


def test_an_id_that_is_here_already_is_an_error(shared: Lane) -> None:
    request = shared.request("twice", None, "feature-extraction", ["a film"])
    shared.lane.submit(request)
    with pytest.raises(ValueError, match="already here"):
        shared.lane.submit(request)
    assert shared.lane.cancel("twice")
    assert not shared.lane.cancel("twice")
    assert shared.drain() == {}


def test_an_adapter_whose_numbers_overflow_fails_only_its_own_rows(shared: Lane) -> None:
    weights = shared.weights["bad"]
    head = {**weights.head, "classifier.weight": torch.full((2, 64), 3e38)}
    shared.weights["bad"] = replace(weights, head=head)
    shared.lane.submit(shared.request("ok", "cls", "text-classification", ["a film"]))
    shared.lane.submit(shared.request("nan", "bad", "text-classification", ["a film"]))
    shared.lane.submit(shared.request("base", None, "feature-extraction", ["a film"]))
    events = shared.drain()
    assert isinstance(events["ok"], EncodeResult)
    assert isinstance(events["base"], EncodeResult)
    failure = events["nan"]
    assert isinstance(failure, Failure)
    assert failure.code == "adapter_failed"
    assert "finite" in failure.message


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_factors_that_overflow_at_run_time_are_the_adapters_fault(
    tmp_path: Path, task: str
) -> None:
    lane = Lane(tmp_path, "distilbert", {"ok": "text-classification", "bad": "text-classification"})
    weights = lane.weights["bad"]
    factors = {path: replace(one, b=one.b * 1e30) for path, one in weights.factors.items()}
    assert all(bool(torch.isfinite(one.b).all()) for one in factors.values())
    lane.weights["bad"] = replace(weights, factors=factors)
    for name in ("bad", "ok"):
        lane.lane.submit(lane.request(name, name, task, ["a fine film"]))
    events = lane.drain()
    assert isinstance(events["ok"], EncodeResult)
    failure = events["bad"]
    assert isinstance(failure, Failure)
    assert failure.code == "adapter_failed"
    assert "finite" in failure.message
    lane.residency.close()


def test_a_base_whose_numbers_overflow_is_the_servers_fault(
    shared: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shared.base.backbone.forward

    def forward(**inputs: Any) -> Any:
        out = real(**inputs)
        out.last_hidden_state = out.last_hidden_state * float("inf")
        return out

    monkeypatch.setattr(shared.base.backbone, "forward", forward)
    shared.lane.submit(shared.request("base", None, "feature-extraction", ["a film"]))
    assert only(shared.drain()).code == "base_failed"


def test_an_adapter_that_waits_for_its_turn_is_not_counted_as_used(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    lane = Lane(
        tmp_path, "distilbert", dict.fromkeys(names, "text-classification"), max_batch_rows=1
    )
    for name in names:
        lane.lane.submit(lane.request(name, name, "text-classification", ["a fine film"]))
    until = time.monotonic() + 60
    while any(lane.residency.state(name) != "ready" for name in names):
        assert time.monotonic() < until
        time.sleep(0.01)
    entries = lane.residency._tiers.entries
    (first,) = (event.id for event in lane.lane.step())
    assert [name for name in names if entries[name].kept_until == 0.0] == [first]
    assert next(reversed(entries)) == first
    lane.residency.close()


def test_questions_are_answered_from_their_contexts(shared: Lane) -> None:
    context = "a very good film by ann in paris"
    shared.lane.submit(
        shared.request("q", "qa", "question-answering", [("in paris", context)], top_k=2)
    )
    event = shared.drain()["q"]
    assert isinstance(event, EncodeResult)
    for one in event.outputs[0]:
        assert context[one["start"] : one["end"]] == one["answer"] != ""


def test_pair_types_reach_a_model_that_knows_them(tmp_path: Path) -> None:
    lane = Lane(tmp_path, "bert", {"pair": "text-classification"})
    pair = lane.text.tokenize([("a film", "by ann in paris")], "text-classification")
    assert pair[0].type_ids is None or 1 in pair[0].type_ids
    typed = (replace(pair[0], type_ids=(0, 0, 0, 0) + (1,) * (len(pair[0].token_ids) - 4)),)
    plain = (replace(pair[0], type_ids=None),)
    lane.lane.submit(lane.request("typed", "pair", "text-classification", None, inputs=typed))
    lane.lane.submit(lane.request("plain", "pair", "text-classification", None, inputs=plain))
    events = lane.drain()
    scores = {
        name: {one["label"]: one["score"] for one in event.outputs[0]}
        for name, event in events.items()
        if isinstance(event, EncodeResult)
    }
    reference = tiny_bases.Reference(tmp_path / "bert", tmp_path / "pair", "text-classification")
    for name, item in (("typed", typed[0]), ("plain", plain[0])):
        logits = reference(item.token_ids, item.type_ids or (0,) * len(item.token_ids)).logits
        for label, score in zip(("no", "yes"), logits[0].softmax(-1).tolist(), strict=True):
            assert scores[name][label] == pytest.approx(score, abs=2e-5)
    assert scores["typed"]["yes"] != pytest.approx(scores["plain"]["yes"], abs=1e-3)
    lane.residency.close()


def test_more_adapters_than_slots_all_get_their_answers(tmp_path: Path) -> None:
    tasks = {f"a{index}": "text-classification" for index in range(5)}
    lane = Lane(tmp_path, "distilbert", tasks, slots=2)
    for turn in range(3):
        for name in tasks:
            lane.lane.submit(
                lane.request(f"{name}-{turn}", name, "text-classification", ["a fine film"])
            )
    events = lane.drain()
    assert len(events) == 15
    scores = {}
    for name in tasks:
        turns = [events[f"{name}-{turn}"] for turn in range(3)]
        values = [e.outputs[0][0]["score"] for e in turns if isinstance(e, EncodeResult)]
        assert values == pytest.approx([values[0]] * 3, abs=1e-5)
        scores[name] = values[0]
    assert len({round(score, 4) for score in scores.values()}) == 5
    snapshot = lane.residency.snapshot()
    assert snapshot.evictions >= 3
    assert snapshot.slots_used <= 2
    lane.residency.close()


def test_adapters_that_found_no_place_in_a_batch_are_not_held(tmp_path: Path) -> None:
    tasks = {f"a{index}": "text-classification" for index in range(3)}
    lane = Lane(tmp_path, "distilbert", tasks, max_batch_rows=1)
    for name in tasks:
        lane.lane.submit(lane.request(name, name, "text-classification", ["a fine film"]))
    until = time.monotonic() + 60
    while any(lane.residency.state(name) != "ready" for name in tasks):
        assert time.monotonic() < until
        time.sleep(0.01)
    for left in (2, 1, 0):
        assert len(lane.lane.step()) == 1
        assert lane.lane.depth() == left
        assert not any(entry.leases for entry in lane.residency._tiers.entries.values())
    lane.residency.close()


def test_a_batch_too_large_for_the_memory_is_halved(
    shared: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = shared.base.backbone.forward

    def forward(texts: Any, **more: Any) -> Any:
        sizes.append(len(texts.lengths))
        if len(texts.lengths) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(texts=texts, **more)

    monkeypatch.setattr(shared.base.backbone, "forward", forward)
    shared.lane.submit(shared.request("r", None, "feature-extraction", tiny_bases.texts(8, seed=2)))
    assert isinstance(shared.drain()["r"], EncodeResult)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_figures_are_of_the_latest_batch(shared: Lane) -> None:
    before = shared.lane.figures()
    shared.lane.submit(
        shared.request("r", "cls", "text-classification", ["a film", "a very good film"])
    )
    shared.drain()
    after = shared.lane.figures()
    assert after.steps == before.steps + 1
    assert (after.last_rows, after.last_adapters) == (2, 1)
    assert after.head_bytes > 0
