"""The comparison of random batches: it runs, and it sees bits that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loadtests.bench.random_batches import (
    BatchLane,
    Comparison,
    LogitsSeen,
    measure,
    pool,
    small_base,
    small_engine,
)
from loadtests.bench.timing import Report


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("lane", ["generation", "encoding"])
def test_batches_are_counted_and_their_cost_is_told(lane: BatchLane) -> None:
    report = Report({"load": [0.0]}, quick=True)
    measure(report, lane, "fp32", "none", batches=10, count=24)
    assert [one.what for one in report.figures] == ["random batches", "time of the default"]
    assert report.figures[0].number >= 10


def test_a_run_that_ends_early_says_how_many_batches_there_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[bool] = []
    plain = Comparison.traffic

    def counted(self: Comparison, engine: Any, seed: int, *, compare: bool) -> tuple[int, float]:
        if seed >= 0:
            turns.append(compare)
        return plain(self, engine, seed, compare=compare)

    monkeypatch.setattr(Comparison, "traffic", counted)
    report, left = Report({"load": [0.0]}, quick=True), iter([True, True, False])
    measure(
        report, "encoding", "fp32", "none", count=6, has_time=lambda: next(left), cost_turns=1,
        at_least=1000,
    )  # fmt: skip
    assert sorted(turns[:2]) == [False, True]
    assert turns[2:] == [True, True]  # later ones are for more batches
    figure = report.figures[0]
    assert 3 <= figure.number < 1000
    assert figure.reached is False


@pytest.mark.parametrize("lane", ["generation", "encoding"])
def test_bits_that_differ_are_seen(lane: BatchLane) -> None:
    seen = LogitsSeen()
    with (
        small_base(lane) as base,
        small_engine(base, "fp32", "nf4", deterministic=False) as engine,
        seen.watching(),
    ):
        comparison = Comparison(pool(base, lane, 24), seen)
        comparison.learn(engine)
        for seed in range(1):
            comparison.traffic(engine, seed, compare=True)
    assert comparison.compared > 20
    assert comparison.differing > 0
