"""The choice of strategies, by an injected clock: nothing here is timed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adapters.kernels
from adapters.kernels import native_ops, torch_ops
from adapters.modulation import autotune
from adapters.modulation import modulator as modulation
from adapters.modulation.autotune import Autotuner
from adapters.modulation.folded import FoldedCache
from adapters.modulation.gpu_kernels import kernels_digest
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator, choose_ways
from adapters.modulation.plan import Plan
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import (
    Bucket,
    Candidate,
    SegmentShape,
    default_way,
    groups_of,
    ways_of,
)
from adapters.segments import from_runs

FOLD: Candidate = ("torch", "fold")
EXPAND: Candidate = ("torch", "expand")
BUCKET = Bucket(20, 10, "nf4 float32", 0, 3, 5)
SHAPE = (96, 192)


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def taking(self, ns: int) -> Callable[[], None]:
        def run() -> None:
            self.now += ns

        return run


def once(tuner: Autotuner, clock: Clock, fold: int, expand: int) -> bool:
    """An occurrence of the bucket in a forward of its own; whether it was timed."""
    tuner.begin_forward()
    due = tuner.is_due(BUCKET, (FOLD, EXPAND))
    if due:
        tuner.run(BUCKET, {FOLD: clock.taking(fold), EXPAND: clock.taking(expand)})
    return due


def winner(tuner: Autotuner) -> str:
    (group,) = groups_of((1024, 1024), "nf4 float32", (SegmentShape(1, 32),) * 8)
    assert group.bucket == BUCKET
    (way,) = set(choose_ways([group], 8, ["torch"], tuner)[1])
    return way


def test_one_bad_time_does_not_decide() -> None:
    clock = Clock()
    tuner = Autotuner(clock=clock)
    once(tuner, clock, 9000, 200)
    assert winner(tuner) == "expand"
    once(tuner, clock, 100, 200)
    assert winner(tuner) == "fold"
    once(tuner, clock, 9000, 200)
    assert winner(tuner) == "fold"


def test_a_loser_wins_later_when_the_machine_has_changed() -> None:
    clock = Clock()
    tuner = Autotuner(clock=clock)
    for _ in range(3):
        once(tuner, clock, 100, 200)
    assert winner(tuner) == "fold"
    for _ in range(300):
        once(tuner, clock, 400, 200)
    assert winner(tuner) == "expand"


def test_rounds_grow_rare_and_never_end() -> None:
    clock = Clock()
    tuner = Autotuner(clock=clock)
    timed = [number for number in range(1, 70) if once(tuner, clock, 1, 2)]
    assert timed == [1, 2, 3, 8, 16, 32, 64]


def test_a_forward_waits_for_few_rounds() -> None:
    clock = Clock()
    tuner = Autotuner(clock=clock)
    tuner.begin_forward()
    timed = 0
    for rows in range(10):
        bucket = BUCKET._replace(rows_log2=rows)
        if tuner.is_due(bucket, (FOLD,)):
            tuner.run(bucket, {FOLD: clock.taking(1)})
            timed += 1
    assert timed == 2


class _CompilerError(Exception):
    """As a compiler's: no RuntimeError."""


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, _CompilerError])
def test_what_fails_never_wins(kind: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise kind("no room")

    clock = Clock()
    tuner = Autotuner(clock=clock)
    tuner.run(BUCKET, {FOLD: clock.taking(10**9), EXPAND: fail})
    assert winner(tuner) == "fold"
    assert "no room" in caplog.text


def test_times_outlive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    tuner = Autotuner(tmp_path / "cache", clock=clock)
    for _ in range(4):
        once(tuner, clock, 100, 200)
    again = Autotuner(tmp_path / "cache", clock=clock)
    assert again.ns(BUCKET, FOLD) == 100
    assert again.is_settled(BUCKET)
    assert winner(again) == "fold"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("torch fold", "torch guess"),
        lambda text: text.replace("100.0", "-1.0"),
        lambda text: text.replace("100.0", "true"),
        lambda text: text.replace('"threads":', '"thread":'),
        lambda text: text.replace("20,10,", "20,"),
        lambda _: "[]",
    ],
)
def test_a_file_that_cannot_be_used_is_left_out(
    tmp_path: Path, change: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tuner = Autotuner(tmp_path, clock=clock)
    for _ in range(4):
        once(tuner, clock, 100, 200)
    (path,) = tmp_path.iterdir()
    path.write_text(change(path.read_text()))
    assert len(Autotuner(tmp_path)) == 0
    assert "cannot be used" in caplog.text


def test_times_of_a_gpu_hold_for_the_kernels_that_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, device = Clock(), torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(autotune, "kernels_digest", lambda: "as they were")
    tuner = Autotuner(tmp_path / "cache", device, clock=clock)
    for _ in range(4):
        once(tuner, clock, 100, 200)
    assert len(Autotuner(tmp_path / "cache", device)) == 1
    monkeypatch.setattr(autotune, "kernels_digest", lambda: "as they are now")
    assert len(Autotuner(tmp_path / "cache", device)) == 0


def test_the_digest_of_the_kernels_is_of_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.kernels, "__path__", [str(tmp_path)])
    seen: set[str] = set()
    try:
        for text in ("one", "two"):
            (tmp_path / "triton_ops.py").write_text(text)
            kernels_digest.cache_clear()
            seen.add(kernels_digest())
    finally:
        kernels_digest.cache_clear()
    assert len(seen) == 2


def test_a_folder_that_cannot_be_written_costs_only_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        tuner = Autotuner(tmp_path / "cache" / "deeper", clock=clock)
        for _ in range(20):
            once(tuner, clock, 100, 200)
    assert winner(tuner) == "fold"
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize(
    ("part", "way"),
    [
        (SegmentShape(256, 0), "base"),
        (SegmentShape(1, 128), "expand"),
        (SegmentShape(2, 16), "expand"),
        (SegmentShape(2, 32), "fold"),
        (SegmentShape(256, 32), "fold"),
        (SegmentShape(256, 32, True), "kept"),
    ],
)
def test_the_rule_before_anything_was_timed(part: SegmentShape, way: str) -> None:
    assert default_way(part) == way
    assert choose_ways(groups_of(SHAPE, "s", (part,)), 1, ["native", "torch"], None) == (
        "native",
        [way],
    )


parts = st.builds(
    SegmentShape, st.integers(1, 400), st.sampled_from([0, 1, 8, 32, 128]), st.booleans()
)


@given(st.lists(parts, max_size=8).map(tuple))
def test_every_segment_is_in_one_group_and_gets_a_possible_way(
    segments: tuple[SegmentShape, ...],
) -> None:
    groups = groups_of(SHAPE, "s", segments)
    places = [place for group in groups for place in group.places]
    assert sorted(places) == list(range(len(segments)))
    _, ways = choose_ways(groups, len(segments), ["torch"], None)
    for part, way in zip(segments, ways, strict=True):
        assert way in ways_of(part)


def test_the_backend_with_the_least_sum_is_taken() -> None:
    clock = Clock()
    tuner = Autotuner(clock=clock)
    groups = groups_of((1024, 1024), "nf4 float32", (SegmentShape(1, 32),) * 8)
    tuner.run(BUCKET, {("native", "fold"): clock.taking(30), ("native", "expand"): clock.taking(9)})
    tuner.run(BUCKET, {FOLD: clock.taking(5), EXPAND: clock.taking(8)})
    assert choose_ways(groups, 8, ["native", "torch"], tuner) == ("torch", ["fold"] * 8)
    assert choose_ways(groups, 8, ["native"], tuner) == ("native", ["expand"] * 8)


@pytest.mark.parametrize("cheaper", ["fold", "expand"])
def test_traffic_itself_is_timed_and_the_winner_used(
    cheaper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, folds = Clock(), 0
    fold_into, expand_into = torch_ops.fold_into, torch_ops.expand_into

    def folding(*args: torch.Tensor) -> None:
        nonlocal folds
        folds += 1
        clock.now += 1 if cheaper == "fold" else 100
        fold_into(*args)

    def expanding(*args: torch.Tensor) -> None:
        clock.now += 10
        expand_into(*args)

    monkeypatch.setattr(torch_ops, "fold_into", folding)
    monkeypatch.setattr(torch_ops, "expand_into", expanding)
    monkeypatch.setattr(modulation, "_FEWEST_WEIGHTS", 1)
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_dense(torch.randn(SHAPE, generator=generator), "nf4")
    slots = {1: SlotFactors("hira", torch.randn(4, SHAPE[1]), torch.randn(SHAPE[0], 4))}
    segments = from_runs([(1, 3)])
    modulator = Modulator("auto", Autotuner(clock=clock))
    call = LayerCall("l", torch.randn(3, SHAPE[1]), weight, slots, segments)
    with native_ops.limited_to("none"):  # what the clock counts is torch's
        for _ in range(4):
            with modulator.planned(Plan(segments)):
                modulator.linear(call)
        before = folds
        with modulator.planned(Plan(segments)):
            modulator.linear(call)
        assert (folds > before) == (cheaper == "fold")


@pytest.mark.parametrize("kernel", ["best", "none"])
def test_what_is_kept_for_one_group_may_take_the_place_of_another_ones(
    kernel: native_ops.Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two folded weights of seven adapters."""
    monkeypatch.setattr(modulation, "_FEWEST_WEIGHTS", 1)
    rng = random.Random(3)
    generator = torch.Generator().manual_seed(3)
    weight = QuantizedWeight.from_dense(torch.randn(SHAPE, generator=generator), "nf4")
    dense = weight.dequantize(dtype=torch.float32).double()
    slots = {
        slot: SlotFactors(
            "hira",
            torch.randn(4, SHAPE[1], generator=generator),
            torch.randn(SHAPE[0], 4, generator=generator),
        )
        for slot in range(1, 8)
    }

    class Guessing(Autotuner):
        """Runs what is due, and finds that a weight that is kept saves more and more."""

        saved = 10.0

        def ns(self, bucket: Bucket, candidate: Candidate) -> float | None:
            known = super().ns(bucket, candidate)
            if known is None:
                return None
            self.saved *= 1.0 + rng.random() / 10
            return 1.0 if candidate[1] in {"held", "kept"} else self.saved

    modulator = Modulator("auto", Guessing())
    kept = modulator.folded = FoldedCache(2 * SHAPE[0] * SHAPE[1] * 4, torch.device("cpu"))
    keys: set[frozenset[int]] = set()
    with native_ops.limited_to(kernel):
        for _ in range(200):
            chosen = rng.sample(sorted(slots), rng.randint(2, 6))
            segments = from_runs([(slot, rng.choice([1, 2, 9])) for slot in chosen])
            x = torch.randn(segments.rows, SHAPE[1], generator=generator)
            with modulator.planned(Plan(segments)):
                found = modulator.linear(LayerCall("l", x, weight, slots, segments))
            for part in segments.parts:
                own = slots[part.slot]
                changed = dense * (1 + own.b.double() @ own.a.double())
                wanted = x[part.start : part.stop].double() @ changed.T
                torch.testing.assert_close(
                    found[part.start : part.stop].double(), wanted, rtol=1e-4, atol=1e-3
                )
            keys.add(frozenset(slot for slot in slots if kept.has(slot, "l")))
    assert len(keys) > 10  # they did take each other's place
