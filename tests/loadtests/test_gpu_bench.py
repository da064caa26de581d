"""The benchmark for a GPU: each part once on the processor, on shapes of nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests.bench import __main__ as command
from loadtests.bench import gpu, gpu_bases, gpu_engine, gpu_http, gpu_record
from loadtests.bench.gpu_layers import LAYER_CASES, LayerCase
from loadtests.bench.gpu_peers import step_s
from loadtests.bench.live import Server
from loadtests.bench.part_clock import PartClock
from loadtests.bench.timing import Figure, Report
from tests.stand import live

FIVE_MINUTES_S = 300.0
# What is asked of a run on a GPU: case, what, and the goals that the real shapes have for it.
ASKED_OF_STEPS = (
    ("3 sequences, 3 adapters", "ahead against earlier steps"),
    ("3 sequences, 3 adapters", "ahead against generate on bitsandbytes"),
    ("4 sequences, 3 adapters", "ahead against earlier steps"),
    ("1 sequence, 1 adapter", "ahead against earlier steps"),
    ("3 sequences, 3 adapters", "ahead against the bare base in this engine"),
    ("3 sequences, 3 adapters of rank 8", "ahead against the bare base in this engine"),
    ("3 prompts of 20, 3 adapters", "ahead against earlier steps"),
    ("swaps", "answers with a wrong token"),
    ("swaps", "bytes of graphs captured meanwhile"),
    ("swaps", "device memory more than before"),
)


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
    @contextmanager
    def running(
        base: Path, adapters: Sequence[Path], dtype: str, *, device: str, more: Sequence[str]
    ) -> Iterator[Server]:
        named = [f"--adapter={one.name}={one}" for one in adapters]
        flags = [f"--base={base}", f"--dtype={dtype}", f"--device={device}", *named, *more]
        with live.hira(tmp_path / "server", *flags) as one:
            child: Any = one.child
            yield Server(int(one.url.rsplit(":", 1)[1]), child, one.log)

    monkeypatch.setattr(gpu_http, "running", running)  # spares the imports of its processes
    found, table = tmp_path / "found.json", tmp_path / "found.md"
    words = ["bench", "gpu", "--dry-run", "--json", str(found), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    told = json.loads(found.read_text(encoding="utf-8"))
    assert told["dry run"]
    assert told["left out"] == []
    page = table.read_text(encoding="utf-8")
    assert "- gpu: none" in page
    assert "Goals reached: " in page
    values = {(one["case"], one["what"]): one for one in told["figures"]}
    layer = "64 x 128, r 4, 40 / 2"
    for what in ("as served", "dense bf16 matmul", "bitsandbytes 4-bit, no adapter"):
        assert (layer, what) in values
        assert (layer, f"{what}, graph") in values
    texts = "encode, 3 x 8, 2 adapters"
    assert "static" in values[texts, "static batches"]["note"]
    assert "unpadded" in values[texts, "dynamic batches"]["note"]
    for kind in ("earlier", "ahead"):
        assert ("tiny, 3 sequences, 3 adapters", f"{kind} steps") in values
    for peer in ("generate on bitsandbytes", "generate on dense bf16"):
        assert ("tiny, 3 sequences, bare base", peer) in values
    assert ("tiny, 3 prompts of 20, bare base", "generate on bitsandbytes") in values
    assert ("tiny, 1 request", "PEFT") in values
    assert values["tiny, swaps", "adapters that left their slots"]["value"] >= 4
    assert values["tiny, swaps", "answers with a wrong token"]["reached"]
    for what in ("time to first token, p50", "time to first token, p99", "ahead steps"):
        assert ("tiny, HTTP, 2 clients", what) in values
    assert values["tiny, HTTP", "texts classified by /predict"]["value"] == 1
    assert values["tiny, HTTP", "pieces to OpenAI's client"]["value"] >= 1
    batches = "encoding, none in fp32", "random batches"
    assert values[batches]["value"] >= values[batches]["at_least"] == 1
    asked = {key for key, one in values.items() if one["reached"] is not None}
    assert asked == {
        (layer, "largest error"),
        (layer, "fastest form, graph"),
        (layer, "fastest form against dense"),
        (texts, "static batches"),
        (texts, "static batches against the bitsandbytes base"),
        batches,
        *((f"tiny, {case}", what) for case, what in ASKED_OF_STEPS),
    }
    for case, what in asked:
        assert f"| {case} | {what} |" in page


def test_the_goals_are_those_of_the_real_shapes() -> None:
    goals = {case.name: (case.at_most_us, case.at_most_dense) for case in LAYER_CASES}
    assert goals["4096 x 4096, r 32, 16 / 16"] == (50.0, None)
    assert goals["14336 x 4096, r 32, 16 / 16"] == (160.0, None)
    assert goals["4096 x 4096, r 32, 64 / 64"] == (200.0, None)
    assert goals["4096 x 4096, r 32, 1 / 1"] == (12.0, None)
    assert goals["4096 x 4096, r 32, 1024 / 8"] == (None, 1.5)
    small, large = (shape.goals for shape in gpu_bases.SHAPES)
    assert (small.usual, large.usual) == pytest.approx((1 / 0.2, 1 / 0.3))
    assert (large.many, large.one) == (5.0, 5.0)
    for one in (small, large):
        assert (one.generate, one.busy, one.prompts) == (4.0, 0.9, 5.0)
        assert (one.adapters, one.few_rank) == (0.6, 0.8)


def test_a_step_is_the_time_of_later_tokens() -> None:
    assert step_s(lambda tokens: 0.5 + 0.02 * tokens, 10) == pytest.approx(0.02)


def test_the_card_is_busy_for_what_kernels_take_of_later_tokens() -> None:
    def run(tokens: int) -> float:
        return 0.5 + 0.02 * tokens

    def kernels_s(call: partial[float]) -> float:
        return 0.4 + 0.75 * (call() - 0.5)

    assert gpu_engine.busy_share(run, 10, 0.02, kernels_s) == pytest.approx(0.75)  # type: ignore[arg-type]


def test_the_parts_fit_into_five_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS) <= gpu.LIMIT_S < FIVE_MINUTES_S


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


def test_a_part_has_what_earlier_ones_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def runs(report: Report, device: torch.device, clock: PartClock) -> None:
        left.append(clock.left_s)

    parts = (gpu.Part("one", 100.0, runs), gpu.Part("two", 50.0, runs))
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.bench(Report({"load": [0.0]}, quick=True, dry_run=True))
    assert left == pytest.approx([1000.0, 1500.0], abs=100)


def test_what_no_longer_fits_is_said() -> None:
    report = Report({"load": [0.0]}, quick=True)
    assert PartClock(report, "layers", 60.0).has_time("a case")
    assert not PartClock(report, "layers", 60.0).has_time("an engine", 100.0)
    assert not PartClock(report, "layers", 0.0).has_time("a case")
    assert report.left_out == [
        "layers: an engine: its time was up",
        "layers: a case: its time was up",
    ]


def test_the_floor_is_that_of_bytes_or_of_operations() -> None:
    assert LayerCase(1, 1).floor_us == pytest.approx(2.3, abs=0.1)
    assert LayerCase(16, 16).floor_us == pytest.approx(22, abs=1)
    assert LayerCase(4096, 16).floor_us == pytest.approx(196, abs=1)
    assert len({case.name for case in LAYER_CASES}) == len(LAYER_CASES)


def measured() -> Report:
    machine = {"gpu": "a card", "driver": "1.2", "cuda": "13.0", "versions": {"torch": "2"}}
    report = Report(machine, quick=False)
    report.add(Figure("gpu", "a | b", "fused", 12.0, unit="us", at_most=15.0, note="a note"))
    report.add(Figure("gpu", "other", "side", 3.0, unit="us"))
    report.leave_out("a part")
    return report


def test_a_table_has_a_row_for_each_figure() -> None:
    page = measured().as_markdown()
    assert "- versions: torch 2" in page
    assert "Goals reached: 1 of 1." in page
    assert page.count("| a / b | fused | 12 us | ≤ 15: reached | a note |") == 2
    assert page.count("| other | side | 3 us |  |  |") == 1
    assert "- a part" in page


def test_the_pages_show_the_newest_record_or_that_there_is_none() -> None:
    told = gpu_record.recorded()
    for page in (gpu_record.README, gpu_record.MEASURED):
        text = (gpu_record.ROOT / page).read_text(encoding="utf-8")
        assert gpu_record.with_figures(page, text, told) == text


def test_a_run_is_recorded_in_the_pages(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in (gpu_record.README, gpu_record.MEASURED):
        text = (gpu_record.ROOT / page).read_text(encoding="utf-8")
        (tmp_path / page).write_text(text, encoding="utf-8")
    gpu_record.record(measured().as_json(), tmp_path)
    readme = (tmp_path / gpu_record.README).read_text(encoding="utf-8")
    assert "On one a card (driver 1.2, CUDA 13.0, torch 2)" in readme
    assert "| a / b | fused |" in readme
    assert "| other |" not in readme
    assert "| other | side |" in (tmp_path / gpu_record.MEASURED).read_text(encoding="utf-8")
    found = gpu_record.recorded(tmp_path)
    assert found is not None
    assert gpu_record.with_figures(gpu_record.README, readme, found) == readme


def test_what_was_not_measured_on_a_gpu_is_not_recorded(tmp_path: Path) -> None:
    told = measured().as_json()
    wrongs: list[dict[str, Any]] = [
        {"dry run": True},
        {"figures": []},
        {"machine": {"gpu": "none"}},
    ]
    for wrong in wrongs:
        with pytest.raises(SystemExit, match="Nothing was measured"):
            gpu_record.record({**told, **wrong}, tmp_path)
    assert not any(tmp_path.iterdir())
