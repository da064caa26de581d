"""Whose rows a step has, where adapters with little to run are to have their tokens often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.generation.sequences import ScheduledRows
from server.generation.step_pace import StepPace, light_parts
from server.messages import GenerateRequest
from tests.stand.dense import Stage, ids_of, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held


@dataclass(eq=False)
class Asked:
    """As much of a running sequence as a pace looks at."""

    request: GenerateRequest
    pending: int


def asked(name: str, version: str | None, pending: int = 1) -> Any:
    request = GenerateRequest(id=name, adapter=version, version=version, token_ids=(1,))
    return Asked(request, pending)


def whole(running: list[Any]) -> list[ScheduledRows]:
    return [ScheduledRows(one, one.pending) for one in running]


def versions_of(parts: list[ScheduledRows]) -> set[str | None]:
    return {part.sequence.request.version for part in parts}


FLOOD = [asked(f"flood{i}", "a") for i in range(60)]

RUNNING = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 40)), max_size=30
)


@given(RUNNING)
def test_light_adapters_have_few_sequences_and_few_rows(
    running: list[tuple[str | None, int]],
) -> None:
    parts = whole([asked(str(i), *one) for i, one in enumerate(running)])
    light = light_parts(parts)
    chosen = versions_of(light)
    assert light == [part for part in parts if part.sequence.request.version in chosen]
    own = {
        version: [part.rows for part in parts if part.sequence.request.version == version]
        for version in versions_of(parts)
    }
    every = sum(map(sum, own.values()))
    assert sum(sum(own[version]) for version in chosen) <= every / 4
    few = {version for version in own if len(own[version]) <= len(parts) / len(own) / 2}
    for version in chosen:
        assert version in few
        assert sum(own[version]) <= every / len(own) / 2
        # Nobody with as few, or fewer, is left out.
        assert all(other in chosen for other in few if sum(own[other]) <= sum(own[version]))


@pytest.mark.parametrize(
    ("running", "light"),
    [
        ({}, set()),
        ({"a": [1] * 64}, set()),
        ({"a": [1] * 60, "b": [1]}, {"b"}),
        ({"a": [1] * 60, "b": [1], None: [1]}, {"b", None}),
        ({"a": [1] * 60, "b": [12]}, {"b"}),  # a prompt of twelve tokens
        ({"a": [1] * 60, "b": [240]}, set()),  # the flood is not light beside a prompt
        ({"a": [1] * 60, "b": [1] * 40}, set()),
        ({"a": [1, 1], "b": [1]}, set()),
        ({name: [1] for name in "abcdefgh"}, set()),
        ({**{str(i): [1] for i in range(60)}, "a": [200]}, set()),
        ({"a": [1] * 20, "b": [1] * 20, **{n: [1] for n in "cdefghijkl"}}, set("cdefghijkl")),
        ({"a": [1] * 10, "b": [1] * 10, **{n: [1] for n in "cdefghijkl"}}, set()),  # a third
    ],
)
def test_who_is_light(running: dict[str | None, list[int]], light: set[str | None]) -> None:
    parts = whole(
        [asked("", name, rows) for name, all_rows in running.items() for rows in all_rows]
    )
    random.Random(0).shuffle(parts)
    assert versions_of(light_parts(parts)) == light


class Machine:
    """Steps that take a fixed time and a time for each row, and who had a row in them."""

    def __init__(self, goal_s: float, fixed_s: float = 0.022, row_s: float = 0.00155) -> None:
        self.pace = StepPace(goal_s, whole)
        self.fixed_s, self.row_s = fixed_s, row_s
        self.now = 0.0

    def step(self, running: list[Any]) -> set[str | None]:
        parts = self.pace.parts(running)
        took = self.fixed_s + self.row_s * sum(part.rows for part in parts)
        self.now += took
        self.pace.took(took)
        return versions_of(parts)


@pytest.mark.parametrize("goal_s", [0.06, 0.08, 0.1])
def test_light_adapters_have_their_tokens_as_often_as_asked_for(goal_s: float) -> None:
    machine = Machine(goal_s)
    running = [*FLOOD, asked("one", "b")]
    steps = [machine.step(running) for _ in range(500)]
    assert all("b" in step for step in steps)
    assert machine.now / len(steps) == pytest.approx(goal_s, rel=0.02)
    counts = {"all": sum("a" in step for step in steps)}
    counts["light"] = len(steps) - counts["all"]
    assert machine.pace.steps == counts


@pytest.mark.parametrize("flood", [4, 12, 60])
@pytest.mark.parametrize("goal_s", [0.001, 0.02])
def test_others_have_at_least_half_of_the_time(goal_s: float, flood: int) -> None:
    """Whatever the goal, be it shorter than any step."""
    machine = Machine(goal_s)
    running = [*FLOOD[:flood], asked("one", "b")]
    full_s = longest_s = 0.0
    for _ in range(500):
        before = machine.now
        if "a" in machine.step(running):
            full_s += machine.now - before
        longest_s = max(longest_s, machine.now - before)
    assert full_s >= machine.now / 2 - longest_s
    assert full_s <= 0.8 * machine.now


def test_a_goal_that_steps_keep_changes_nothing() -> None:
    machine = Machine(0.2)
    assert all("a" in machine.step([*FLOOD, asked("one", "b")]) for _ in range(50))
    assert machine.pace.steps == {"all": 50, "light": 0}


@pytest.mark.parametrize("running", [FLOOD, [asked(str(i), str(i)) for i in range(60)]])
def test_steps_are_everybodys_where_nobody_is_light(running: list[Any]) -> None:
    machine = Machine(0.01)
    assert all(machine.step(running) == versions_of(whole(running)) for _ in range(50))


def test_a_disturbed_step_stops_nobody_for_long() -> None:
    machine = Machine(0.06)
    running = [*FLOOD, asked("one", "b")]
    for disturbed_at in (0, 40):
        while sum(machine.pace.steps.values()) < disturbed_at:
            machine.step(running)
        machine.pace.parts(running)
        machine.pace.took(3600.0)
        began = machine.now
        while "a" not in machine.step(running):
            pass
        assert machine.now - began < 0.8


def test_who_comes_during_a_long_step_is_next() -> None:
    machine = Machine(0.06)
    for _ in range(30):
        machine.step(FLOOD)
    assert machine.step([*FLOOD, asked("one", "b", 12)]) == {"b"}


def test_what_was_owed_long_ago_is_not_owed_for_ever() -> None:
    machine = Machine(0.001)
    for _ in range(300):
        machine.step([*FLOOD, asked("one", "b")])
    machine.fixed_s, machine.row_s = 0.0004, 0.0  # faster than the goal from now on
    steps = [machine.step([*FLOOD, asked("one", "b")]) for _ in range(1000)]
    assert all("a" in step for step in steps[-300:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_answers_are_the_same_whoever_has_steps(name: str, deterministic: bool) -> None:
    stage = Stage(name, token_ms=0.001, deterministic=deterministic)  # no step is as short
    wanted = {}
    for i, prompt in enumerate(prompts(16, 60, seed=1)):
        version = VERSIONS[i % 4] if i < 4 else "a"
        wanted[stage.submit(version, prompt, max_new_tokens=12)] = (version, prompt)
    results = terminals(stage.drain(4000))
    assert {r.id for r in results} == set(wanted)
    for result in results:
        assert ids_of(result) == stage.reference(*wanted[result.id], 12)
    steps = stage.lane.figures().paced_steps
    assert steps["light"] > 3
    assert steps["all"] > 3
    assert nothing_is_held(stage)


def test_a_goal_that_is_never_missed_changes_no_step() -> None:
    plans = []
    for token_ms in (None, 60_000.0):
        stage = Stage(token_ms=token_ms)
        for i, prompt in enumerate(prompts(6, 60, seed=2)):
            stage.submit(VERSIONS[i % 4], prompt, max_new_tokens=4)
        stage.drain()
        plans.append([[(p.slot, p.rows) for p in plan.parts] for plan in stage.adapted.plans])
    assert plans[0] == plans[1]


def test_who_leaves_between_steps_holds_up_nobody() -> None:
    stage = Stage(token_ms=0.001)
    flood = [stage.submit("a", prompt, max_new_tokens=20) for prompt in prompts(12, 9, seed=3)]
    light = [stage.submit(version, [5, 6, 7], max_new_tokens=20) for version in ("b", "c", None)]
    for step in range(6):
        stage.lane.step()
        if step % 2:
            assert stage.lane.cancel(light.pop())
            assert stage.lane.cancel(flood.pop())
    assert {one.id for one in terminals(stage.drain(4000))} == set(flood)
    assert stage.lane.figures().paced_steps["light"]
    assert nothing_is_held(stage)
