"""Steps that are to take a given time: how many rows they may have, and whose."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.generation.step_pace import LEAST_ROWS, StepPace
from server.messages import GenerateRequest
from tests.stand.dense import Stage, ids_of, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held


@dataclass(eq=False)
class Asked:
    """As much of a running sequence as a pace looks at."""

    request: GenerateRequest
    pending: int
    slot: int


def asked(name: str, version: str | None, pending: int = 1) -> Any:
    request = GenerateRequest(id=name, adapter=version, version=version, token_ids=(1,))
    return Asked(request, pending, 0 if version is None else 1 + ord(version[0]))


def limited_to(rows: int, most_of_one: int = 1000) -> StepPace:
    pace = StepPace(1.0, rows, most_of_one)
    assert pace.rows == rows
    return pace


def rows_by_version(parts: list[Any]) -> dict[str | None, int]:
    rows: dict[str | None, int] = {}
    for part in parts:
        version = part.sequence.request.version
        rows[version] = rows.get(version, 0) + part.rows
    return rows


RUNNING = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 40)),
    min_size=1,
    max_size=30,
)


@given(RUNNING, st.integers(1, 60), st.integers(1, 50))
def test_rows_are_all_that_may_be_had_and_shared_alike(
    running: list[tuple[str | None, int]], rows: int, most: int
) -> None:
    sequences = [asked(str(i), *one) for i, one in enumerate(running)]
    parts = limited_to(rows, most).parts(sequences)
    wanted: dict[str | None, int] = {}
    for one in sequences:
        version = one.request.version
        wanted[version] = wanted.get(version, 0) + min(one.pending, most)
    got = rows_by_version(parts)
    assert sum(got.values()) == min(rows, sum(wanted.values()))
    assert all(0 < part.rows <= min(part.sequence.pending, most) for part in parts)
    assert len({id(part.sequence) for part in parts}) == len(parts)
    # Whoever gets less than it wants gets as much as anybody, but for the row that is left over.
    for version, want in wanted.items():
        if got.get(version, 0) < want:
            assert got.get(version, 0) >= max(got.values()) - 1
    slots = [part.sequence.slot for part in parts]
    assert slots == sorted(slots)


@pytest.mark.parametrize(("rows", "versions"), [(5, "a"), (3, "abcdefgh"), (7, "aab")])
def test_everybody_has_a_turn(rows: int, versions: str) -> None:
    sequences = [asked(str(i), versions[i % len(versions)]) for i in range(24)]
    pace = limited_to(rows)
    had: dict[str, list[int]] = {}
    for step in range(48):
        for part in pace.parts(sequences):
            had.setdefault(part.sequence.request.id, []).append(step)
    # Of 24 sequences of one row each, no version has more than its share of them.
    for one in sequences:
        steps = had[one.request.id]
        own = sum(other.request.version == one.request.version for other in sequences)
        share = max(1, rows // len(set(versions)))
        turns = max(1, len(set(versions)) / rows)
        between = [b - a for a, b in zip([-1, *steps], [*steps, 48], strict=True)]
        assert max(between) <= -(-own // share) * turns + turns + 1


@pytest.mark.parametrize("version", ["a", None])
def test_newcomers_hold_up_nobody(version: str | None) -> None:
    """Requests that come in every step, of this adapter or each of another one."""
    rng = random.Random(2)
    staying = [asked(f"stays{i}", "z") for i in range(8)]
    coming: list[Any] = []
    latest = dict.fromkeys((one.request.id for one in staying), 0)
    pace = limited_to(16)
    for step in range(300):
        while len(coming) < 24:
            name = f"new{step}-{len(coming)}"
            coming.append(asked(name, "z" if version else name, rng.randint(1, 20)))
        for part in pace.parts([*staying, *coming]):
            if part.sequence in coming:
                coming.remove(part.sequence)
            else:
                latest[part.sequence.request.id] = step
        # 16 rows, of one adapter or of as many as there are, and 32 who wait for them.
        assert step - min(latest.values()) <= 30


def test_a_flood_leaves_another_adapter_its_turn_in_each_step() -> None:
    flood = [asked(f"flood{i}", "a", 1 + 30 * (i % 2)) for i in range(63)]
    one = asked("one", "b")
    pace = limited_to(20)
    for _ in range(10):
        assert rows_by_version(pace.parts([*flood, one])) == {"a": 19, "b": 1}
    one.pending = 35
    assert rows_by_version(pace.parts([*flood, one])) == {"a": 10, "b": 10}


@pytest.mark.parametrize(("fixed_s", "row_s"), [(0.022, 0.00155), (0.001, 0.01), (0.02, 0.0001)])
@pytest.mark.parametrize("goal_s", [0.06, 0.2])
def test_steps_come_to_take_what_they_should(fixed_s: float, row_s: float, goal_s: float) -> None:
    rng = random.Random(1)
    pace = StepPace(goal_s, 1000, 1000)
    best = min(1000.0, max(LEAST_ROWS, (goal_s - fixed_s) / row_s))
    seen = []
    for step in range(400):
        if step == 200:  # a machine that takes twice as long from now on
            fixed_s, row_s = 1.4 * fixed_s, 2 * row_s
            best = min(1000.0, max(LEAST_ROWS, (goal_s - fixed_s) / row_s))
        rows = pace.rows
        pace.took(rows, (fixed_s + row_s * rows) * rng.uniform(0.95, 1.05))
        seen.append(rows)
        if step % 200 > 100:
            assert 0.8 * best - 1 <= rows <= 1.25 * best + 1


def test_short_steps_of_few_rows_leave_the_limit_where_it_is() -> None:
    pace = limited_to(100)
    pace.took(100, 4.0)
    limit = pace.rows
    assert limit == 70
    for _ in range(50):
        pace.took(3, 0.01)
    assert pace.rows == limit
    for _ in range(50):
        pace.took(pace.rows, 0.01)
    assert pace.rows == 100


def test_a_small_step_that_is_disturbed_costs_little() -> None:
    pace = StepPace(0.05, 1000, 1000)
    pace.took(1, 3600.0)
    assert pace.rows == 700


def test_one_step_too_long_costs_little_and_some_rows_are_left() -> None:
    pace = limited_to(100)
    pace.took(100, 3600.0)
    assert pace.rows == 70
    for _ in range(100):
        pace.took(pace.rows, 3600.0)
    assert pace.rows == LEAST_ROWS
    for _ in range(30):
        pace.took(pace.rows, 0.0)
    assert pace.rows == 100


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_are_the_same_however_short_steps_are(name: str) -> None:
    stage = Stage(name, step_ms=0.001)  # no step is as short
    wanted = {}
    for i, prompt in enumerate(prompts(10, 60, seed=1)):
        wanted[stage.submit(VERSIONS[i % 4], prompt, max_new_tokens=6)] = (VERSIONS[i % 4], prompt)
    results = terminals(stage.drain(4000))
    assert {r.id for r in results} == set(wanted)
    for result in results:
        assert ids_of(result) == stage.reference(*wanted[result.id], 6)
    assert stage.adapted.plans[-1].rows <= LEAST_ROWS
    limit = stage.lane.figures().step_limit
    assert limit["rows"] == LEAST_ROWS
    assert limit["bounded_steps"] > 10
    assert nothing_is_held(stage)


def test_streams_go_on_while_short_requests_come() -> None:
    stage = Stage(step_ms=0.001)
    streams = [stage.submit("a", [5, 6 + i], max_new_tokens=24, ignore_eos=True) for i in range(2)]
    ended: set[str] = set()
    for step in range(200):
        if step % 2 == 0 and not ended.issuperset(streams):
            for i in range(4):
                stage.submit("a", [7 + i] * 16, max_new_tokens=1, ignore_eos=True)
        ended |= {event.id for event in terminals(stage.lane.step())}
    assert ended.issuperset(streams)


def test_a_goal_that_is_never_missed_changes_no_step() -> None:
    plans = []
    for step_ms in (None, 60_000.0):
        stage = Stage(step_ms=step_ms)
        for i, prompt in enumerate(prompts(6, 60, seed=2)):
            stage.submit(VERSIONS[i % 4], prompt, max_new_tokens=4)
        stage.drain()
        plans.append([[(p.slot, p.rows) for p in plan.parts] for plan in stage.adapted.plans])
    assert plans[0] == plans[1]
