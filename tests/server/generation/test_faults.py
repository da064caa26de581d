"""Faults in the generate lane: who is at fault fails, and nobody beside them notices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.segments import Segments
from server.generation import forward as generate_batch
from server.generation.sampling import Choice, choose
from tests.stand.dense import Stage, ids_of, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_forward_that_fails_once_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    asked = {
        stage.submit(version, [5, 6 + i], max_new_tokens=8, ignore_eos=True): (version, [5, 6 + i])
        for i, version in enumerate("aabb")
    }

    def explode(plan: Segments) -> None:
        if stage.lane.figures().steps == 3:
            raise RuntimeError("no memory")

    stage.adapted.before_batch = explode
    for result in terminals(stage.drain()):
        assert ids_of(result) == stage.reference(*asked[result.id], 8)
    assert nothing_is_held(stage)
    assert "run apart" in caplog.text


def test_an_adapter_whose_forward_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()

    def explode(plan: Segments) -> None:
        if 2 in plan.slots and stage.lane.figures().steps > 3:
            raise RuntimeError("no such kernel")

    stage.adapted.before_batch = explode
    asked = {}
    for i, prompt in enumerate(prompts(12, 40, seed=4)):
        asked[stage.submit(VERSIONS[i % 4], prompt, ignore_eos=True)] = (VERSIONS[i % 4], prompt)
    results = stage.drain()
    assert len(results) == len(asked)
    for result in results:
        version, prompt = asked[result.id]
        if stage.residency.slots.get(version or "") == 2:
            assert (result.code, "no such kernel" in result.found) == ("internal", True)
        else:
            assert ids_of(result) == stage.reference(version, prompt, 12)
    assert nothing_is_held(stage)
    assert "no such kernel" in caplog.text


@pytest.mark.parametrize("fault", ["raises", "overflows"])
def test_what_the_bare_base_fails_at_is_the_bases_fault(fault: str) -> None:
    stage = Stage()

    def explode(plan: Segments) -> None:
        if stage.lane.figures().steps <= 3:
            return
        if fault == "raises":
            raise RuntimeError("a base of stone")
        stage.adapted.model.lm_head.weight.data.fill_(float("nan"))
        for weights in stage.adapted.slots.values():
            weights["lm_head"].fill_(float("nan"))

    stage.adapted.before_batch = explode
    for i, prompt in enumerate(prompts(8, 40, seed=4)):
        stage.submit(VERSIONS[i % 4], prompt, ignore_eos=True)
    results = stage.drain()
    assert len(results) == 8
    for result in results:
        assert result.code == "base_failed", result
    assert nothing_is_held(stage)


def test_numbers_that_overflow_in_an_adapter_alone_are_its_own_fault() -> None:
    stage = Stage()
    stage.adapted.slots[2]["lm_head"].fill_(float("nan"))
    asked = {}
    for i, prompt in enumerate(prompts(8, 40, seed=4)):
        asked[stage.submit(VERSIONS[i % 4], prompt, ignore_eos=True)] = VERSIONS[i % 4]
    for result in stage.drain():
        bad = stage.residency.slots.get(asked[result.id] or "") == 2
        assert getattr(result, "code", None) == ("adapter_failed" if bad else None)
    assert nothing_is_held(stage)


def test_a_request_whose_step_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()

    def explode(logits: torch.Tensor, choosers: list[Any]) -> list[Choice]:
        if any(one.options.seed == 666 for one in choosers):
            raise RuntimeError("this one")
        return choose(logits, choosers)

    monkeypatch.setattr(generate_batch, "choose", explode)
    asked = {stage.submit("a", prompt): prompt for prompt in prompts(7, 20, seed=6)}
    bad = stage.submit("a", [5, 6, 7], seed=666)
    for result in stage.drain():
        if result.id == bad:
            assert result.code == "internal"
        else:
            assert ids_of(result) == stage.reference("a", asked[result.id], 12)
    assert nothing_is_held(stage)


def test_a_neighbour_that_fails_after_the_draw_changes_no_seeded_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = {"do_sample": True, "temperature": 5.0, "ignore_eos": True}
    asked = [(prompt, 100 + i) for i, prompt in enumerate(prompts(4, 20, seed=6))]

    def answers(stage: Stage) -> dict[str, list[int]]:
        return {one.id: ids_of(one) for one in stage.drain() if one.id != "bad"}

    quiet, stage = Stage(), Stage()
    for prompt, seed in asked:
        quiet.submit("a", prompt, seed=seed, id=f"{seed}", **sampling)
        stage.submit("a", prompt, seed=seed, id=f"{seed}", **sampling)

    def explode(logits: torch.Tensor, choosers: list[Any]) -> list[Choice]:
        made = choose(logits, choosers)
        if any(one.options.seed == 666 for one in choosers):
            raise RuntimeError("this one")
        return made

    monkeypatch.setattr(generate_batch, "choose", explode)
    stage.submit("a", [5, 6, 7], seed=666, id="bad", **sampling)
    assert answers(stage) == answers(quiet)


def test_a_lost_device_ends_the_engine_and_not_its_requests_one_by_one() -> None:
    stage = Stage()

    def explode(plan: Segments) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    stage.adapted.before_batch = explode
    stage.submit("a", [5, 6, 7])
    with pytest.raises(torch.AcceleratorError):
        stage.drain()
