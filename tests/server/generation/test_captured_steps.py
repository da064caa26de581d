"""Static steps of a lane where memory ends while they are captured, or the device cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from server.base.captured_steps import CannotCapture, CapturedSteps, StepKey
from server.generation import forward, static_step
from server.generation.step_buffers import RowNumbers, StepBuffers
from server.options import DecodeSteps
from tests.stand.dense import terminals
from tests.stand.made_up_steps import MadeUpSteps
from tests.stand.static_steps import factors_of, staged


@pytest.mark.parametrize("steps", ["static", "ahead"])
def test_fewer_buckets_are_captured_and_all_steps_are_right(
    steps: DecodeSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = staged(steps="dynamic")
    lengths = [4, 4, 9]
    alone = [
        plain.answer("a", [5, 6, 7 + number], ignore_eos=True, max_new_tokens=length)
        for number, length in enumerate(lengths)
    ]
    made = MadeUpSteps(room_rows=2)
    monkeypatch.setattr(static_step, "CapturedSteps", lambda *_: made)
    stage, adapted = staged(steps=steps, max_sequences=4)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    assert {key.rows for key in made.runs} == {1, 2}
    assert made.refused == [4]  # once, not for each class of launches
    adapted.install(1, factors_of(stage.adapted.original, 1))
    for number, length in enumerate(lengths):
        stage.submit(
            "a", [5, 6, 7 + number], ignore_eos=True, max_new_tokens=length, id=f"q{number}"
        )
    ends = {one.id: one for one in terminals(stage.drain())}
    for number, one in enumerate(alone):
        assert [t.id for t in ends[f"q{number}"].tokens] == [t.id for t in one.tokens]
    # Three at once are in no step that was captured: they gain nothing by fixed buffers.
    ran = stage.lane.figures().steps_by
    assert (ran["prefill"], ran["uncaptured"], ran["static"] + ran["ahead"]) == (1, 3, 5)
    assert bool(ran["ahead"]) == (steps == "ahead")


def test_what_little_was_captured_is_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class WrongSteps(MadeUpSteps):
        """Right as long as nothing is captured."""

        def replay(self, key: StepKey) -> bool:
            known = super().replay(key)
            if known and key.plain and key.rows == 2:
                buffers[-1].told_ids[0] += 1
            return known

    buffers: list[StepBuffers] = []
    plain = StepBuffers.fill

    def fill(self: StepBuffers, numbers: Sequence[RowNumbers]) -> None:
        buffers.append(self)
        plain(self, numbers)

    monkeypatch.setattr(StepBuffers, "fill", fill)
    monkeypatch.setattr(static_step, "CapturedSteps", lambda *_: WrongSteps(room_rows=2))
    stage, adapted = staged(max_sequences=4)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    assert "tokens or log-probabilities differ" in caplog.text
    stage.answer(None, [5, 6, 7], max_new_tokens=2, ignore_eos=True)
    assert dict(stage.lane.figures().steps_by) == {"differs": 2}


@pytest.mark.parametrize("error", [CannotCapture("operation not permitted\nwhen capturing"), None])
def test_a_device_that_captures_nothing_leaves_all_as_it_was(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, adapted = staged(max_sequences=2)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)

    def cannot(self: CapturedSteps, key: StepKey, run: Callable[[], None]) -> bool:
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(CapturedSteps, "possible", True)
    monkeypatch.setattr(CapturedSteps, "capture", cannot)
    stage.lane.start_steps()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "Decode steps stay dynamic: " + (
        "memory ended before any was captured"
        if error is None
        else "CannotCapture: operation not permitted when capturing"
    )
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    reason = "uncaptured" if error is None else "uncapturable"
    assert dict(stage.lane.figures().steps_by) == {reason: 4}
    assert not stage.lane.figures().static_bytes
    assert adapted.modulator.static is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError("x"), "failed"), (None, "memory"), (RuntimeError("no driver"), "failed")],
)
def test_buffers_that_cannot_be_made_end_no_start(
    error: Exception | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise error or torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "StaticStep", cannot)
    stage, adapted = staged(max_sequences=2)
    stage.lane.start_steps()
    assert adapted.modulator.static is None  # no table is kept, or filled
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Decode steps stay dynamic: ")
    stage.answer(None, [5, 6, 7], max_new_tokens=2, ignore_eos=True)
    assert dict(stage.lane.figures().steps_by) == {reason: 2}
