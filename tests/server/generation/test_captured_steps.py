"""Capturing steps where memory ends, or the device cannot: by a device that is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from server.base.captured_steps import CapturedSteps, StepKey
from server.generation import static_step
from tests.stand.dense import terminals
from tests.stand.made_up_steps import MadeUpSteps
from tests.stand.static_steps import factors_of, staged


class MadeUpGraph:
    """A graph that only knows how often it was replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[MadeUpGraph]]:
    """torch.cuda as far as capturing uses it; the third graph raises what is given."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    @contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    def set_up(error: Exception | None) -> list[MadeUpGraph]:
        graphs: list[MadeUpGraph] = []

        def graph() -> MadeUpGraph:
            graphs.append(MadeUpGraph())
            return graphs[-1]

        @contextmanager
        def capturing(*_: Any, **__: Any) -> Iterator[None]:
            yield
            if error is not None and len(graphs) == 3:
                raise error

        for name, fake in {
            "memory_reserved": lambda _: 0,
            "Stream": lambda _: Stream(),
            "current_stream": lambda _: Stream(),
            "stream": nothing,
            "CUDAGraph": graph,
            "graph": capturing,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return graphs

    return set_up


def test_what_was_captured_stays_when_memory_ends(
    no_device: Callable[[Exception | None], list[MadeUpGraph]], caplog: pytest.LogCaptureFixture
) -> None:
    graphs = no_device(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"))
    steps = CapturedSteps(torch.device("cuda"))
    keys = [StepKey(rows, 32, False, True) for rows in (8, 4, 2)]
    assert [steps.capture(key, lambda: None) for key in keys] == [True, True, False]
    assert list(steps) == keys[:2]
    assert steps.replay(keys[1])
    assert not steps.replay(keys[2])
    assert [one.replays for one in graphs[:2]] == [0, 1]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "No memory to capture steps of 2 rows" in line
    assert "kv_bytes" in line


def test_another_error_is_not_taken_for_want_of_memory(
    no_device: Callable[[Exception | None], list[MadeUpGraph]],
) -> None:
    no_device(RuntimeError("operation not permitted when stream is capturing"))
    steps = CapturedSteps(torch.device("cuda"))
    for rows in (8, 4):
        assert steps.capture(StepKey(rows, 32, False, True), lambda: None)
    with pytest.raises(RuntimeError, match="not permitted"):
        steps.capture(StepKey(2, 32, False, True), lambda: None)


def test_fewer_buckets_are_captured_and_all_steps_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, _ = staged(max_sequences=8)
    alone = [plain.answer("a", [5, 6, 7 + n], ignore_eos=True) for n in range(6)]
    made = MadeUpSteps(room_rows=4)
    monkeypatch.setattr(static_step, "CapturedSteps", lambda _: made)
    stage, adapted = staged(max_sequences=8)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    assert {key.rows for key in made.runs} == {1, 2, 4}
    assert made.refused == [8]  # once, not for each class of launches
    adapted.install(1, factors_of(stage.adapted.original, 1))
    for number in range(6):
        stage.submit("a", [5, 6, 7 + number], ignore_eos=True, id=f"q{number}")
    ends = {one.id: one for one in terminals(stage.drain())}
    for number, one in enumerate(alone):
        assert [t.id for t in ends[f"q{number}"].tokens] == [t.id for t in one.tokens]
    assert stage.lane.figures().steps_by["static"] > 5


def test_a_device_that_cannot_capture_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, adapted = staged()
    for slot in (1, 2, 3):
        adapted.uninstall(slot)

    def cannot(self: CapturedSteps, key: StepKey, run: Callable[[], None]) -> bool:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(CapturedSteps, "possible", True)
    monkeypatch.setattr(CapturedSteps, "capture", cannot)
    stage.lane.start_steps()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "stay dynamic: RuntimeError: operation not permitted when" in line
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert dict(stage.lane.figures().steps_by) == {"uncapturable": 4}
