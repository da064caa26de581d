"""Steps launched before the one before them was read: the answers of steps that wait, each time."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.generation.static_step import LaunchedStep, StaticStep
from server.messages import GenerateResult, TokenEvent
from server.options import DecodeSteps
from tests.stand.dense import Stage, prompts, terminals
from tests.stand.generate_lane import nothing_is_held
from tests.stand.launches import Launches
from tests.stand.static_steps import VERSIONS, factors_of, staged, wish


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def traffic(name: str, steps: DecodeSteps, seed: int) -> tuple[Stage, dict[str, Any], set[str]]:
    """Requests with every way to end, some of them cancelled; their events by request."""
    stage, _ = staged(name, steps, max_sequences=6)
    chance = random.Random(seed)
    asked = [
        (
            chance.choice(VERSIONS),
            prompt,
            {
                **wish(chance),
                "max_new_tokens": chance.randint(1, 24),
                "ignore_eos": chance.random() < 0.2,
                "end_ids": tuple(chance.sample(range(3, 320), 12)),
                "stop": tuple(chance.sample("etaoin shrdlu", chance.randint(0, 2))),
                "stream": chance.random() < 0.5,
            },
        )
        for prompt in prompts(24, 40, seed=seed)
    ]
    gone = {f"r{n}" for n in range(1, 25) if chance.random() < 0.15}
    moments = {one: chance.randint(2, 30) for one in gone}
    events: dict[str, list[Any]] = defaultdict(list)
    for turn in range(2000):
        for _ in range(chance.randint(0, 2) if turn % 7 == 0 else 0):
            if asked:
                version, prompt, more = asked.pop()
                stage.submit(version, prompt, **more)
        for one in [one for one, moment in moments.items() if moment == turn]:
            stage.lane.cancel(one)
        for event in stage.lane.step():
            events[event.id].append(event)
        if not asked and not stage.lane.has_work():
            return stage, events, gone
    raise AssertionError("the lane did not come to an end")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_steps_that_wait(name: str, seed: int) -> None:
    waiting, wanted, gone = traffic(name, "static", seed)
    ahead, found, _ = traffic(name, "ahead", seed)
    reasons = set()
    for key in wanted.keys() | found.keys():
        if key in gone:
            continue
        mine, theirs = found[key], wanted[key]
        end, other = mine[-1], theirs[-1]
        assert isinstance(end, GenerateResult), end
        assert [one.id for one in end.tokens] == [one.id for one in other.tokens]
        for field in ("text", "tail", "finish_reason", "prompt_tokens", "version"):
            assert getattr(end, field) == getattr(other, field), field
        for one, two in zip(mine[:-1], theirs[:-1], strict=True):
            assert isinstance(one, TokenEvent)
            assert (one.token_id, one.text) == (two.token_id, two.text)
        for token, likewise in zip(end.tokens, other.tokens, strict=True):
            assert token.logprob == pytest.approx(likewise.logprob, abs=1e-4)
        reasons.add(end.finish_reason)
    assert reasons == {"length", "eos_token", "stop_sequence"}
    for stage in (waiting, ahead):
        assert nothing_is_held(stage)
    steps = ahead.lane.figures().steps_by
    assert set(steps) == {"static", "ahead", "prefill"}
    assert steps["ahead"] > steps["static"]
    assert "ahead" not in waiting.lane.figures().steps_by


def test_a_step_is_launched_before_the_one_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, adapted = staged(steps="ahead")
    told: list[str] = []
    launch, choices, run = StaticStep.launch, LaunchedStep.choices, StaticStep.run
    steps: dict[Any, list[Any]] = {}

    def launched(self: StaticStep, *args: Any) -> LaunchedStep:
        told.append("launch")
        return launch(self, *args)

    def read(self: LaunchedStep) -> Any:
        told.append("read")
        return choices(self)

    def watched(self: StaticStep, key: Any) -> None:
        static = adapted.modulator.static
        assert static is not None
        with Launches([*self.fixed(), static.hira, static.lora, static.scales]) as launches:
            run(self, key)
        steps.setdefault(key, []).append(launches.found)

    monkeypatch.setattr(StaticStep, "launch", launched)
    monkeypatch.setattr(LaunchedStep, "choices", read)
    monkeypatch.setattr(StaticStep, "run", watched)
    for version in ("a", "b"):
        stage.submit(version, [5, 6, 7], max_new_tokens=9, ignore_eos=True)
    stage.drain()
    # The first token of each comes from its prompt, so eight more.
    assert told == ["launch", *["launch", "read"] * 7, "read"]
    (runs,) = steps.values()
    assert all(one == runs[0] for one in runs)


def test_what_has_ended_keeps_its_pages_and_its_lease_while_a_step_writes_for_it() -> None:
    stage, _ = staged(steps="ahead")
    asked = [5, 6, 7]
    tokens = [t.id for t in stage.answer("a", asked, max_new_tokens=12, ignore_eos=True).tokens]
    ends = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    stage.submit("a", asked, max_new_tokens=12, end_ids=(tokens[ends],), id="ends")
    stage.submit("b", asked, max_new_tokens=12, ignore_eos=True, id="goes on")
    while not terminals(stage.lane.step()):
        pass
    assert stage.residency.leases["a"] == 1  # of the row that is one too many
    stage.lane.step()
    assert stage.residency.leases["a"] == 0
    found = terminals(stage.drain())
    wanted = stage.answer("b", asked, max_new_tokens=12, ignore_eos=True)
    assert [t.id for t in found[0].tokens] == [t.id for t in wanted.tokens]
    assert nothing_is_held(stage)


def test_a_name_that_was_cancelled_may_come_again_at_once() -> None:
    stage, _ = staged(steps="ahead")
    wanted = stage.answer("b", [9, 8, 7, 6], ignore_eos=True, repetition_penalty=1.5)
    for _ in range(3):
        stage.submit("a", [5, 6, 7], ignore_eos=True, repetition_penalty=1.5, id="again")
        for _ in range(4):
            stage.lane.step()
        assert stage.lane.cancel("again")
        stage.submit("b", [9, 8, 7, 6], ignore_eos=True, repetition_penalty=1.5, id="again")
        (found,) = terminals(stage.drain())
        assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens]
    assert nothing_is_held(stage)


def test_a_broken_adapter_fails_alone() -> None:
    stage, adapted = staged(steps="ahead")
    alone = stage.answer("b", [5, 6, 7], ignore_eos=True)
    for version in ("a", "b", None):
        stage.submit(version, [5, 6, 7], ignore_eos=True, id=f"of {version}")
    for _ in range(4):
        stage.lane.step()
    broken = factors_of(stage.adapted.original, 1)
    for entry in broken.values():
        entry.a.mul_(1e30)
    adapted.uninstall(1)
    adapted.install(1, broken, checked=True)
    ends = {one.id: one for one in terminals(stage.drain())}
    assert ends["of a"].code == "adapter_failed"
    assert [t.id for t in ends["of b"].tokens] == [t.id for t in alone.tokens]
    assert ends["of None"].finish_reason == "length"
    assert nothing_is_held(stage)


@pytest.mark.parametrize("what", ["launch", "choices"])
def test_a_step_that_fails_is_run_the_other_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = staged(steps="ahead")
    wish_for = {"ignore_eos": True, "do_sample": True, "seed": 3, "max_new_tokens": 10}
    wanted = stage.answer("a", [5, 6, 7], **wish_for)
    where: Any = StaticStep if what == "launch" else LaunchedStep
    plain, calls = getattr(where, what), iter(range(1000))

    def fails(self: Any, *args: Any) -> Any:
        if next(calls) % 3 == 2:
            raise RuntimeError("no such launch")
        return plain(self, *args)

    monkeypatch.setattr(where, what, fails)
    found = stage.answer("a", [5, 6, 7], **wish_for)
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens]
    assert next(calls) > 5
    assert nothing_is_held(stage)


def test_closing_answers_everybody_and_holds_nothing() -> None:
    stage, _ = staged(steps="ahead")
    for version in ("a", "b"):
        stage.submit(version, [5, 6, 7], ignore_eos=True)
    for _ in range(4):
        stage.lane.step()
    assert len(stage.lane.close()) == 2
    assert nothing_is_held(stage)
    assert not stage.lane.has_work()


def test_the_start_tries_steps_that_read_their_tokens_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, adapted = staged(steps="ahead")
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert stage.lane.figures().steps_by["ahead"] == 2
    plain = StaticStep.launch

    def forgets(self: StaticStep, sequences: Any, after: Any) -> LaunchedStep:
        launched = plain(self, sequences, after)
        self.buffers.told_ids[0] += 1
        return launched

    monkeypatch.setattr(StaticStep, "launch", forgets)
    stage.lane.start_steps()
    assert stage.lane.figures().steps_by["differs"] == 0
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert stage.lane.figures().steps_by["differs"] == 4
