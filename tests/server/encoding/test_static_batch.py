"""Batches over fixed buffers: what padded ones give, by the same launches on the same memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.modulation.static_layers import StaticTokens
from adapters.segments import from_rows
from server.base.captured_steps import StepKey
from server.base.load import load_base
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.encoding.batch import Rows
from server.encoding.read import BatchStates
from server.encoding.static_batch import StaticBatch, token_buckets
from server.encoding.unpadded import UnpaddedForward, static_fault
from server.messages import EncodeResult, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane
from tests.stand.launches import Launches

SUM_ORDER_TOLERANCE = 1e-4
MOST_TOKENS, MOST_TEXTS = 100, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ways:
    """One base whose batches run over fixed buffers, two adapters in it, and the other way."""

    def __init__(self, root: Path, kind: str) -> None:
        folder = tiny_bases.base_folder(root, kind)
        self.base = load_base(tiny_bases.options(folder, root))
        self.rows = Rows(self.base, tiny_bases.text_of(folder))
        self.unpadded = UnpaddedForward(self.base, self.rows, RopeByLength(self.base.model))
        assert self.unpadded.make_static(3, MOST_TOKENS, MOST_TEXTS) is None
        for slot in (1, 2):
            self.install(slot, slot)

    @property
    def static(self) -> StaticBatch:
        assert self.unpadded.static is not None
        return self.unpadded.static

    def install(self, slot: int, seed: int, rank: int = 5) -> None:
        adapted = self.base.adapted
        adapted.uninstall(slot)
        method: Any = "hira" if slot == 1 else "lora"
        adapted.install(slot, probe_factors(adapted, seed, method, rank, dtype=self.base.dtype))

    def padded(self, items: Any, slots: Any) -> BatchStates:
        feed = self.rows.feed(items)
        each = from_rows(slots)
        with torch.inference_mode(), self.base.adapted.batch(each.repeat(feed.tokens), each):
            out = self.base.backbone(**feed.arguments)
        ids, mask = feed.tables(out.last_hidden_state)
        return BatchStates(out.last_hidden_state, getattr(out, "pooler_output", None), ids, mask)


def random_batch(seed: int, most: int = MOST_TOKENS) -> tuple[list[TokenizedInput], list[int]]:
    chance = random.Random(seed)
    lengths: list[int] = []
    for _ in range(chance.randint(1, MOST_TEXTS)):
        length = chance.choice([1, 2, 7, 7, 19, 30])
        if sum(lengths) + length <= most:
            lengths.append(length)
    lengths = lengths or [1]
    slots = sorted(chance.choice([0, 1, 2]) for _ in lengths)
    ids = range(5, tiny_bases.VOCABULARY)
    return [TokenizedInput(tuple(chance.choice(ids) for _ in range(n))) for n in lengths], slots


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
def test_states_are_those_of_padded_batches(kind: str, tmp_path: Path) -> None:
    ways = Ways(tmp_path, kind)
    for seed in range(6):
        items, slots = random_batch(seed)
        with torch.inference_mode():
            found = ways.unpadded(items, slots)
        assert ways.unpadded.ran == "static"
        wanted = ways.padded(items, slots)
        for mine, theirs, mask in zip(found.hidden, wanted.hidden, wanted.mask, strict=True):
            error = (mine[mask == 1] - theirs[mask == 1]).abs().max()
            assert error <= SUM_ORDER_TOLERANCE * theirs[mask == 1].abs().max()
        assert (found.pooled is None) == (wanted.pooled is None)
        if found.pooled is not None and wanted.pooled is not None:
            assert torch.allclose(found.pooled, wanted.pooled, atol=5e-4)
    for slot in (1, 2):
        ways.base.adapted.uninstall(slot)
    assert static_fault(ways.base, ways.unpadded, ways.padded) is None


def test_launches_and_addresses_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(tmp_path, "bert")
    layers = ways.base.adapted.modulator.static
    assert layers is not None
    plain_run = StaticBatch.run
    batches: dict[StepKey, list[list[Any]]] = {}

    def watched(self: StaticBatch, key: StepKey) -> None:
        with Launches([*self.fixed(), layers.hira, layers.lora, layers.scales]) as launches:
            plain_run(self, key)
        batches.setdefault(key, []).append(launches.found)

    monkeypatch.setattr(StaticBatch, "run", watched)
    for seed in range(24):
        items, slots = random_batch(seed)
        ways.unpadded.by_static(items, slots)
        if seed % 3 == 0:
            ways.install(1, seed, rank=3 + seed % 20)
    assert max(map(len, batches.values())) > 5
    for runs in batches.values():
        assert len(runs[0]) > 20
        assert all(run == runs[0] for run in runs[1:])


def test_larger_launches_give_the_same(tmp_path: Path) -> None:
    ways = Ways(tmp_path, "bert")
    items, slots = random_batch(1, most=14)
    with torch.inference_mode():
        found = ways.unpadded.by_static(items, slots)
        assert found is not None
        known = found.hidden.clone()
        for tokens in token_buckets(MOST_TOKENS):
            larger = ways.unpadded.by_static(items, slots, StepKey(tokens, 128, True, True))
            assert larger is not None
            assert torch.allclose(larger.hidden, known, atol=1e-5)


def test_what_cannot_run_so_runs_as_before(tmp_path: Path) -> None:
    ways = Ways(tmp_path, "bert")
    ways.install(1, 1, rank=129)
    item = TokenizedInput((5, 6, 7))
    with torch.inference_mode():
        for slots, items, ran in (
            ([1], [item], "rank"),
            ([0] * 7, [item] * 7, "rows"),
            ([0], [item], "static"),
        ):
            states = ways.unpadded(items, slots)
            assert ways.unpadded.ran == ran
            assert states.hidden.shape[:2] == (len(items), 3)


def test_a_batch_that_raises_is_run_again_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(tmp_path, "bert")
    items, slots = random_batch(2)

    def raises(self: StaticBatch, key: StepKey) -> None:
        raise RuntimeError("no such launch")

    with torch.inference_mode():
        wanted = ways.unpadded.side_by_side(items, slots).hidden
        monkeypatch.setattr(StaticBatch, "run", raises)
        found = ways.unpadded(items, slots).hidden
    assert ways.unpadded.ran == "failed"
    assert torch.equal(found, wanted)


def test_the_lane_runs_so_when_asked_and_says_so(tmp_path: Path) -> None:
    tasks = {"a": "text-classification", "b": "text-classification"}
    answers = {}
    for kind in ("dynamic", "static"):
        (tmp_path / kind).mkdir()
        lane = Lane(tmp_path / kind, "bert", tasks, encode_batches=kind, max_batch_tokens=128)
        for number, version in enumerate(("a", "b", "a")):
            lane.lane.submit(lane.request(str(number), version, tasks["a"], ["a b c", "d"]))
        answers[kind] = lane.drain()
        figures = lane.lane.figures()
        assert set(figures.steps_by) == {"unpadded" if kind == "dynamic" else "static"}
        assert bool(figures.static_bytes) == (kind == "static")
    for name, one in answers["static"].items():
        other = answers["dynamic"][name]
        assert isinstance(one, EncodeResult)
        assert isinstance(other, EncodeResult)
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert left["score"] == pytest.approx(right["score"], abs=1e-4)


def test_batches_that_differ_are_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain_run = StaticBatch.run

    def wrong(self: StaticBatch, key: StepKey) -> None:
        plain_run(self, key)
        self.fixed()[2].mul_(1.01)

    monkeypatch.setattr(StaticBatch, "run", wrong)
    tasks = {"a": "text-classification"}
    lane = Lane(tmp_path, "bert", tasks, encode_batches="static", max_batch_tokens=128)
    assert "No batch of texts is static" in caplog.text
    lane.lane.submit(lane.request("1", "a", tasks["a"], ["a b c"]))
    lane.drain()
    assert set(lane.lane.figures().steps_by) == {"unpadded"}


def test_tiles_hold_every_row_once_and_no_other() -> None:
    chance = random.Random(0)
    made = StaticTokens(300, 7, torch.device("cpu"))
    for _ in range(50):
        rows = chance.choice([16, 64, 300])
        runs: list[tuple[int, int]] = []
        for _ in range(chance.randint(0, 6)):
            left = rows - sum(count for _, count in runs)
            runs.append((chance.randint(0, 9), chance.randint(0, left)))
        made.fill(runs, rows)
        made.shape(rows, 32, False)
        many = made.tiles.many
        owner = [-1] * rows
        for slot, first, count in many.tiles.view(-1, 3)[: many.count].tolist():
            assert 0 <= count <= many.block_rows
            for row in range(first, first + count):
                assert owner[row] == -1
                owner[row] = slot
        wanted = [slot for slot, count in runs for _ in range(count)]
        assert owner == [*wanted, *[0] * (rows - len(wanted))]
        assert made.slots.tolist() == owner


def test_too_many_runs_are_refused() -> None:
    made = StaticTokens(32, 3, torch.device("cpu"))
    with suppress(ValueError):
        made.fill([(1, 1), (2, 1), (1, 1)], 32)
        raise AssertionError("four runs where there is room for three")


def test_buckets_hold_any_number_of_tokens() -> None:
    for most in (1, 15, 16, 17, 100, 8192):
        made = token_buckets(most)
        assert list(made) == sorted(set(made))
        assert made[-1] == most
