"""The benchmark for a GPU: each part once on the processor, on shapes of nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loadtests.bench import __main__ as command
from loadtests.bench import gpu
from loadtests.bench.gpu_layers import LAYER_CASES, LayerCase
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Figure, Report

LIMIT_S = 300.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = Report({"load": [0.0]}, quick=True)
    gpu.bench(report)
    assert "no GPU" in capsys.readouterr().out
    assert not report.figures


@pytest.mark.http
@pytest.mark.timeout(900)
def test_a_dry_run_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, table = tmp_path / "found.json", tmp_path / "found.md"
    words = ["bench", "gpu", "--dry-run", "--json", str(found), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    told = json.loads(found.read_text(encoding="utf-8"))
    assert told["dry run"]
    assert told["left out"] == []
    assert "gpu: none" in table.read_text(encoding="utf-8")
    sides = {(one["case"], one["what"]) for one in told["figures"]}
    layer = "64 x 128, r 4, 40 / 2"
    assert (layer, "as served") in sides
    for what in ("dense bf16 matmul", "bitsandbytes 4-bit, no adapter"):
        assert (layer, what) in sides
        assert (layer, f"{what}, graph") in sides
    for name, kinds in (
        ("tiny", ("dynamic", "static", "ahead")),
        ("tiny, untied", ("ahead",)),
    ):
        for case in ("3 sequences, 3 adapters", "4 sequences, 3 adapters", "1 sequence, 1 adapter"):
            for kind in kinds:
                assert (f"{name}, {case}", f"{kind} steps") in sides
        assert (f"{name}, prompts of 20, 3 adapters", "ahead steps") in sides
        for peer in ("generate on bitsandbytes", "generate on dense bf16"):
            assert (f"{name}, 3 sequences, bare base", peer) in sides
        assert (f"{name}, 1 request", "PEFT") in sides
    values = {(one["case"], one["what"]): one for one in told["figures"]}
    assert values["tiny, swaps", "adapters that left their slots"]["value"] >= 6
    assert values["tiny, swaps", "answers with a wrong token"]["reached"]
    for clients in (1, 2):
        assert (f"tiny, HTTP, {clients} clients", "time to first token, p99") in sides
    assert ("encode, 3 x 8, 2 adapters", "speed of bitsandbytes base") in sides
    assert "unpadded" in values["encode, 3 x 8, 2 adapters", "engine"]["note"]
    assert any(case.startswith("encoding") or "random" in what for case, what in sides)


def test_the_parts_fit_into_five_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS) <= LIMIT_S


def test_a_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(report: Report, device: torch.device, clock: PartClock) -> None:
        raise RuntimeError("out of\nmemory")

    def runs(report: Report, device: torch.device, clock: PartClock) -> None:
        report.add(Figure("gpu", "a case", "a side", 1.0))

    monkeypatch.setattr(gpu, "PARTS", (gpu.Part("one", 1.0, fails), gpu.Part("two", 1.0, runs)))
    report = Report({"load": [0.0]}, quick=True, dry_run=True)
    gpu.bench(report)
    assert report.left_out == ["one: RuntimeError: out of memory"]
    assert len(report.figures) == 1
    assert "- one: RuntimeError: out of memory" in report.as_markdown()


def test_what_no_longer_fits_is_said() -> None:
    report = Report({"load": [0.0]}, quick=True)
    assert PartClock(report, "layers", 60.0).has_time("a case")
    assert not PartClock(report, "layers", 0.0).has_time("a case")
    assert report.left_out == ["layers: a case: its time was up"]


def test_the_floor_is_that_of_bytes_or_of_operations() -> None:
    assert LayerCase(1, 1).floor_us == pytest.approx(2.3, abs=0.1)
    assert LayerCase(16, 16).floor_us == pytest.approx(22, abs=1)
    assert LayerCase(4096, 16).floor_us == pytest.approx(196, abs=1)
    assert len({case.name for case in LAYER_CASES}) == len(LAYER_CASES)


def test_a_table_has_a_row_for_each_figure() -> None:
    report = Report({"gpu": "none"}, quick=True)
    report.add(Figure("gpu", "a | b", "fused", 12.0, unit="us", at_most=15.0, note="a note"))
    table = report.as_markdown()
    assert "gpu: none" in table
    assert "| a / b | fused | 12 us | ≤ 15 | a note |" in table
