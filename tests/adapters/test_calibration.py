from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters import probes
from adapters.calibration import calibrate
from adapters.costs import UNMEASURED, Costs, ShapeClass
from adapters.inject import AdaptedModel, inject
from adapters.kernels import native_ops
from tests.adapters.tiny_models import build

SHAPE = (512, 512)


class _OneLayer(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.only = nn.Linear(shape[1], shape[0], bias=False)


@pytest.fixture
def model() -> AdaptedModel:
    return inject(_OneLayer(SHAPE).bfloat16())


def _only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def _forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(probes, "measure", measure)


def test_costs_are_measured_once_and_read_again(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    first = calibrate(model, torch.bfloat16, tmp_path / "made")
    assert torch.get_num_threads() == threads
    own = first.table[ShapeClass.of(SHAPE)]
    assert set(own) == ({"native", "torch"} if native_ops.available() else {"torch"})
    for costs in own.values():
        assert all(getattr(costs, field.name) >= 0 for field in fields(Costs))
        assert costs.row > 0
        assert costs.call_ns > 0
    _forbid(monkeypatch)
    assert calibrate(model, torch.bfloat16, tmp_path / "made").table == first.table


def test_another_dtype_is_measured_for_itself(model: AdaptedModel, tmp_path: Path) -> None:
    calibrate(model, torch.bfloat16, tmp_path)
    table = calibrate(model, torch.float32, tmp_path).table
    assert len(list(tmp_path.iterdir())) == 2
    assert set(table[ShapeClass.of(SHAPE)]) == {"torch"}


def _spoil(held: dict[str, Any], how: str) -> str:
    entry = held["costs"]["18,9"]["torch"]
    if how == "cut":
        return json.dumps(held)[:-40]
    if how == "of another machine":
        held["machine"]["threads"] += 1
    elif how == "of another format":
        held["format"] += 1
    elif how == "negative":
        entry["row"] = -1.0
    elif how == "not finite":
        entry["row"] = float("inf")
    elif how == "no number":
        entry["row"] = "fast"
    elif how == "a field short":
        del entry["row"]
    elif how == "beyond a float":
        entry["row"] = 10**400
    elif how == "too deep":
        return "[" * 200_000
    elif how == "a list":
        return "[]"
    return json.dumps(held)


@pytest.mark.parametrize(
    "how",
    [
        "cut", "of another machine", "of another format", "negative", "not finite", "no number",
        "a field short", "a list", "beyond a float", "too deep",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_measured_anew_and_replaced(
    model: AdaptedModel, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    calibrate(model, torch.bfloat16, tmp_path)
    path = _only_file(tmp_path)
    good = json.loads(path.read_text())
    path.write_text(_spoil(json.loads(path.read_text()), how))
    with caplog.at_level(logging.WARNING):
        table = calibrate(model, torch.bfloat16, tmp_path).table
    assert "cannot be used" in caplog.text
    assert ShapeClass.of(SHAPE) in table
    again = json.loads(_only_file(tmp_path).read_text())
    assert again["machine"] == good["machine"]
    assert set(again["costs"]) == set(good["costs"])


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    model: AdaptedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        table = calibrate(model, torch.bfloat16, blocked / "cache").table
    assert ShapeClass.of(SHAPE) in table
    assert "cannot be" in caplog.text


def test_a_file_that_cannot_be_put_in_its_place_leaves_nothing(
    model: AdaptedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def replace(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", replace)
    with caplog.at_level(logging.WARNING):
        calibrate(model, torch.bfloat16, tmp_path)
    assert "no space left" in caplog.text
    assert not list(tmp_path.iterdir())


# Nanoseconds of every probe of a layer of 512 x 512.
TIMES = {
    "t call": 3e3, "t decode": 41e3, "t tile": 73e3, "t many": 326e3, "t fold low": 105e3,
    "t fold high": 232e3, "t expand": 477e3, "t kept": 249e3, "fill": 162e3, "n call": 6e3,
    "n one": 22e3, "n few": 42e3, "n tile": 54e3, "n many": 340e3, "n fold low": 217e3,
    "n fold high": 600e3, "n expand": 283e3, "n kept": 2153e3,
}  # fmt: skip
UP = {"t tile": 400e3, "n tile": 400e3}  # then a row takes less than nothing


def _noisy(monkeypatch: pytest.MonkeyPatch, turns: int) -> list[bool]:
    """For so many turns something else runs beside a probe; returns whether, turn by turn."""
    begun: list[bool] = []

    def run(bench: Any, *_: object) -> None:
        begun.append(len(begun) < turns)
        bench.best = TIMES | (UP if begun[-1] else {})

    monkeypatch.setattr(probes._Bench, "_run", run)
    monkeypatch.setattr(probes._Bench, "memory_share", lambda *_: 1.0)
    return begun


def test_what_noise_hides_is_measured_again(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _noisy(monkeypatch, 0)
    quiet = calibrate(model, torch.bfloat16).table
    begun = _noisy(monkeypatch, 2)
    assert calibrate(model, torch.bfloat16, tmp_path).table == quiet
    assert begun == [True, True, False]
    _forbid(monkeypatch)
    assert calibrate(model, torch.bfloat16, tmp_path).table == quiet


def test_what_stays_hidden_is_built_in_and_not_kept(
    model: AdaptedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = _noisy(monkeypatch, 100)
    with caplog.at_level(logging.WARNING):
        own = calibrate(model, torch.bfloat16, tmp_path).table[ShapeClass.of(SHAPE)]
    (built_in,) = UNMEASURED.table.values()
    for backend, costs in own.items():
        assert costs.row == built_in[backend].row
        assert costs.call_ns == TIMES[f"{backend[0]} call"]
    assert "built-in costs stand for" in caplog.text
    assert not list(tmp_path.iterdir())
    before = len(begun)
    assert before > 1
    calibrate(model, torch.bfloat16, tmp_path)
    assert len(begun) > before, "the next start did not measure"


def test_layers_too_small_to_matter_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid(monkeypatch)
    assert calibrate(inject(build("opt")), torch.float32, tmp_path) is UNMEASURED
    assert not list(tmp_path.iterdir())


def test_a_probe_that_fails_leaves_the_built_in_costs(
    model: AdaptedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def measure(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for probes")

    monkeypatch.setattr(probes, "measure", measure)
    with caplog.at_level(logging.WARNING):
        assert calibrate(model, torch.bfloat16, tmp_path) is UNMEASURED
    assert "no room for probes" in caplog.text
    assert not list(tmp_path.iterdir())
