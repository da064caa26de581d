from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters import calibration
from adapters.calibration import calibrate
from adapters.costs import UNMEASURED, Costs, ShapeClass
from adapters.inject import AdaptedModel, inject
from adapters.kernels import native_ops
from tests.adapters.tiny_models import build

SHAPE = (128, 256)


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

    monkeypatch.setattr(calibration, "_measure", measure)


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
    entry = held["costs"]["15,8"]["torch"]
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
    elif how == "a list":
        return "[]"
    return json.dumps(held)


@pytest.mark.parametrize(
    "how",
    [
        "cut", "of another machine", "of another format", "negative", "not finite", "no number",
        "a field short", "a list",
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

    monkeypatch.setattr(calibration, "_measure", measure)
    with caplog.at_level(logging.WARNING):
        assert calibrate(model, torch.bfloat16, tmp_path) is UNMEASURED
    assert "no room for probes" in caplog.text
    assert not list(tmp_path.iterdir())
