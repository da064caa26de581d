"""Faults in the encode lane: the request at fault fails, and nobody beside it notices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.encoding import postprocess
from server.encoding.heads import TaskHead
from server.messages import EncodeResult, Failure
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane

BAD = 3  # of the requests


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    tasks = {"cls": "text-classification"}
    made = Lane(tmp_path_factory.mktemp("faults"), "distilbert", tasks)
    yield made
    made.residency.close()


def ask(lane: Lane) -> dict[str, Any]:
    """Seven requests of one adapter, in one batch."""
    lane.residency.prefetch("cls")
    for number, text in enumerate(tiny_bases.texts(7, seed=5)):
        top_k = 1 if number == BAD else 2
        request = lane.request(str(number), "cls", "text-classification", [text], top_k=top_k)
        lane.lane.submit(request)
    return lane.drain()


def bad_ids(lane: Lane) -> list[int]:
    (item,) = lane.text.tokenize([tiny_bases.texts(7, seed=5)[BAD]], "text-classification")
    return list(item.token_ids)


def fail_in_the_backbone(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = lane.base.backbone.forward, bad_ids(lane)

    def forward(input_ids: torch.Tensor, **more: Any) -> Any:
        ids = input_ids.flatten().tolist()  # texts lie side by side
        if any(ids[at : at + len(bad)] == bad for at in range(len(ids))):
            raise RuntimeError("this one")
        return real(input_ids=input_ids, **more)

    monkeypatch.setattr(lane.base.backbone, "forward", forward)


def fail_in_the_head(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = TaskHead.__call__, bad_ids(lane)

    def call(head: TaskHead, hidden: Any, pooled: Any, ids: torch.Tensor, mask: Any) -> Any:
        if bad in [row[: len(bad)] for row in ids.tolist()]:
            raise RuntimeError("this one")
        return real(head, hidden, pooled, ids, mask)

    monkeypatch.setattr(TaskHead, "__call__", call)


def fail_in_the_reading(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    real = postprocess.classify

    def classify(*given: Any, top_k: int | None, **more: Any) -> Any:
        if top_k == 1:
            raise RuntimeError("this one")
        return real(*given, top_k=top_k, **more)

    monkeypatch.setattr(postprocess, "classify", classify)


@pytest.mark.parametrize(
    "fault", [fail_in_the_backbone, fail_in_the_head, fail_in_the_reading], ids=lambda f: f.__name__
)
def test_a_request_that_fails_fails_alone(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    truth = ask(lane)
    fault(lane, monkeypatch)
    ended = ask(lane)
    bad = ended.pop(str(BAD))
    assert isinstance(bad, Failure)
    code = "base_failed" if fault is fail_in_the_backbone else "internal"
    assert (bad.code, "this one" in str(bad.found)) == (code, True)
    assert len(ended) == 6
    for name, event in ended.items():
        assert isinstance(event, EncodeResult), event
        for mine, other in zip(event.outputs[0], truth[name].outputs[0], strict=True):
            assert mine["label"] == other["label"]
            assert mine["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_forward_that_fails_once_costs_nobody_an_answer(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lane.base.backbone.forward, []

    def forward(**given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("just now")
        return real(**given)

    monkeypatch.setattr(lane.base.backbone, "forward", forward)
    assert all(isinstance(event, EncodeResult) for event in ask(lane).values())
    assert len(calls) > 1


def test_a_lost_device_is_not_taken_for_the_fault_of_a_row(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def classify(*given: Any, **more: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(postprocess, "classify", classify)
    with pytest.raises(torch.AcceleratorError):
        ask(lane)
    lane.lane.close()
