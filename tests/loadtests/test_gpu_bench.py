"""The benchmark for a GPU, its parts run once on the CPU and on shapes of nothing."""

from __future__ import annotations

import pytest
import torch

from loadtests.bench import gpu, gpu_encode, gpu_engine
from loadtests.bench.timing import Figure, Report

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = Report({"load": [0.0]}, quick=True)
    gpu.bench(report)
    assert "no GPU" in capsys.readouterr().out
    assert not report.figures


def test_steps_prompts_and_peers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"load": [0.0]}, quick=True)
    shape = gpu_engine.Shape("tiny", 128, 256, 2, 2, 1, True, 4, 1 << 22)
    gpu_engine.measure(
        report, shape, CPU, adapters=2, new_tokens=3, vocabulary=6144, prompt_tokens=20
    )
    told = {(one.case, one.what) for one in report.figures}
    for steps in ("dynamic steps", "static steps", "ahead steps"):
        for case in ("2 sequences, 2 adapters", "4 sequences, 2 adapters", "1 sequence, 1 adapter"):
            assert (f"tiny, {case}", steps) in told
    assert ("tiny, 1 request", "PEFT") in told
    assert all(one.number > 0 for one in report.figures)


def test_texts_are_told_against_peers() -> None:
    report = Report({"load": [0.0]}, quick=True)
    cases = (gpu_encode.EncodeCase(3, 8, 2, 0.5),)
    gpu_encode.measure(report, CPU, cases, hidden=64, layers=1, rounds=1)
    assert [one.what for one in report.figures] == [
        "engine",
        "speed of bitsandbytes base",
        "speed of dense model",
    ]


def test_a_table_has_a_row_for_each_figure() -> None:
    report = Report({"gpu": "none"}, quick=True)
    report.add(Figure("gpu", "a | b", "fused", 12.0, unit="us", at_most=15.0, note="a note"))
    table = report.as_markdown()
    assert "gpu: none" in table
    assert "| a / b | fused | 12 us | ≤ 15 | a note |" in table
