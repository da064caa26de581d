"""Whose rows a step has, where adapters with little to run are to have their tokens often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.generation.sequences import ScheduledRows
from server.generation.step_pace import StepPace, light_ones
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


def versions_of(running: list[Any]) -> set[str | None]:
    return {one.request.version for one in running}


FLOOD = [asked(f"flood{i}", "a") for i in range(60)]

RUNNING = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 40)), max_size=30
)


@given(RUNNING)
def test_light_ones_are_all_of_their_adapters_and_want_little(
    running: list[tuple[str | None, int]],
) -> None:
    sequences = [asked(str(i), *one) for i, one in enumerate(running)]
    light = light_ones(sequences)
    chosen = versions_of(light)
    assert light == [one for one in sequences if one.request.version in chosen]
    wanted = {
        version: sum(one.pending for one in sequences if one.request.version == version)
        for version in versions_of(sequences)
    }
    every = sum(wanted.values())
    assert sum(wanted[version] for version in chosen) <= every / 4
    for version in chosen:
        assert wanted[version] <= every / len(wanted) / 2
        # Nobody who wants as little, or less, is left out.
        assert all(other in chosen for other in wanted if wanted[other] <= wanted[version])


@pytest.mark.parametrize(
    ("rows", "light"),
    [
        ({}, set()),
        ({"a": 64}, set()),
        ({"a": 60, "b": 1}, {"b"}),
        ({"a": 60, "b": 1, None: 1}, {"b", None}),
        ({"a": 60, "b": 12}, {"b"}),  # a prompt of twelve tokens
        ({"a": 60, "b": 40}, set()),
        ({"a": 2, "b": 1}, set()),
        (dict.fromkeys("abcdefgh", 1), set()),
        ({"a": 20, "b": 20, **dict.fromkeys("cdefghijkl", 1)}, set("cdefghijkl")),
        ({"a": 10, "b": 10, **dict.fromkeys("cdefghijkl", 1)}, set()),  # a third of all rows
    ],
)
def test_who_is_light(rows: dict[str | None, int], light: set[str | None]) -> None:
    running = [asked(f"{name} {i}", name) for name, count in rows.items() for i in range(count)]
    random.Random(0).shuffle(running)
    assert versions_of(light_ones(running)) == light


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
        return versions_of([part.sequence for part in parts])


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


@pytest.mark.parametrize("goal_s", [0.001, 0.03])
def test_others_have_at_least_half_of_the_time(goal_s: float) -> None:
    """Whatever the goal, be it shorter than any step."""
    machine = Machine(goal_s)
    running = [*FLOOD, asked("one", "b"), asked("two", None)]
    full_s = 0.0
    for _ in range(500):
        before = machine.now
        if "a" in machine.step(running):
            full_s += machine.now - before
    long_s, short_s = (machine.fixed_s + rows * machine.row_s for rows in (62, 2))
    assert full_s / machine.now >= long_s / (2 * long_s + short_s)  # one short step too many
    assert full_s / machine.now < 0.6  # and the light ones have about the other half


def test_a_goal_that_steps_keep_changes_nothing() -> None:
    machine = Machine(0.2)
    assert all("a" in machine.step([*FLOOD, asked("one", "b")]) for _ in range(50))
    assert machine.pace.steps == {"all": 50, "light": 0}


@pytest.mark.parametrize("running", [FLOOD, [asked(str(i), str(i)) for i in range(60)]])
def test_steps_are_everybodys_where_nobody_is_light(running: list[Any]) -> None:
    machine = Machine(0.01)
    assert all(machine.step(running) == versions_of(running) for _ in range(50))


def test_who_comes_during_a_long_step_is_next() -> None:
    machine = Machine(0.06)
    for _ in range(30):
        machine.step(FLOOD)
    assert machine.step([*FLOOD, asked("one", "b", 12)]) == {"b"}


def test_what_was_owed_long_ago_is_not_owed_for_ever() -> None:
    machine = Machine(0.001)
    for _ in range(300):
        machine.step([*FLOOD, asked("one", "b")])
    machine.pace.took(0.0005)
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
        wanted[stage.submit(version, prompt, max_new_tokens=6)] = (version, prompt)
    results = terminals(stage.drain(4000))
    assert {r.id for r in results} == set(wanted)
    for result in results:
        assert ids_of(result) == stage.reference(*wanted[result.id], 6)
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
