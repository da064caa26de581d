"""Batches over fixed buffers: what padded ones give, by the same launches on the same memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.bert.modeling_bert import BertPooler

from adapters.modulation.static_rows import StaticTokens
from adapters.segments import from_rows
from server.base.captured_steps import LAUNCH_CLASSES, CannotCapture, CapturedSteps, StepKey
from server.base.failed_steps import MOST_FAILURES
from server.base.load import load_base
from server.base.memory import later_bytes
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.encoding import static_batch
from server.encoding.batch import Rows
from server.encoding.read import BatchStates
from server.encoding.static_batch import StaticBatch, StaticTexts, attend_under_mask, token_buckets
from server.encoding.text_bounds import TextBounds
from server.encoding.unpadded import UnpaddedForward, attend_text_by_text, static_fault
from server.encoding.way_times import TIMED_BATCHES, Way
from server.messages import EncodeResult, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane
from tests.stand.launches import Launches
from tests.stand.made_up_steps import MadeUpSteps

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

    def __init__(self, root: Path, kind: str, slots: int = 4) -> None:
        folder = tiny_bases.base_folder(root, kind)
        self.base = load_base(tiny_bases.options(folder, root))
        self.rows = Rows(self.base, tiny_bases.text_of(folder))
        self.unpadded = UnpaddedForward(self.base, self.rows, RopeByLength(self.base.model))
        assert self.unpadded.make_static(slots, MOST_TOKENS, MOST_TEXTS) is None
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


@pytest.mark.parametrize("slots", [2, 3])
def test_few_slots_are_compared_as_well(slots: int, tmp_path: Path) -> None:
    ways = Ways(tmp_path, "bert", slots)
    for slot in (1, 2):
        ways.base.adapted.uninstall(slot)
    assert static_fault(ways.base, ways.unpadded, ways.padded) is None


def test_a_pooler_is_part_of_a_batch_unless_it_reads_more_than_first_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"a": "text-classification", "b": "text-classification"}
    plain = BertPooler.forward
    seen: list[int] = []
    place = 0

    def pool(self: Any, hidden: torch.Tensor) -> Any:
        seen.append(hidden.shape[1])
        return plain(self, hidden[:, place : place + 1])

    monkeypatch.setattr(BertPooler, "forward", pool)
    for place in (0, 1):
        answers: list[dict[str, Any]] = []
        for kind in ("dynamic", "static"):
            root = tmp_path / f"{place} {kind}"
            root.mkdir()
            lane = Lane(root, "bert", tasks, encode_batches=kind, max_batch_tokens=64)
            seen.clear()
            for name, version in (("1", "a"), ("2", "b")):
                lane.lane.submit(lane.request(name, version, tasks["a"], ["a b c", "d e"]))
            answers.append(lane.drain())
            ran = "static" if kind == "static" else "unpadded"
            assert set(lane.lane.figures().steps_by) == {ran}
            lane.residency.close()
        assert (set(seen) == {1}) == (place == 0)  # of each text its first token alone
        for name, wanted in answers[0].items():
            for mine, theirs in zip(answers[1][name].outputs, wanted.outputs, strict=True):
                tiny_bases.assert_close(mine, theirs)


def test_states_that_are_not_finite_stay_in_their_text(tmp_path: Path) -> None:
    ways = Ways(tmp_path, "bert")
    items, slots = [TokenizedInput((5, 6, 7, one)) for one in (8, 9, 10)], [0, 1, 2]
    with torch.inference_mode():
        wanted = ways.unpadded.side_by_side(items, slots).hidden
        # No adapter gets into a slot like this: it stands for a product that overflows.
        for layer in ways.base.adapted.layers.values():
            if 1 in layer.slots:
                layer.slots[1].a[0] = float("nan")
        found = ways.unpadded(items, slots)
    assert ways.unpadded.ran == "static"
    assert torch.isnan(found.hidden[1]).any(-1).all()
    for text in (0, 2):
        assert torch.allclose(found.hidden[text], wanted[text], atol=1e-4)


@pytest.mark.parametrize("faster", ["static", "unpadded"])
def test_the_way_that_was_faster_is_taken(
    faster: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(static_batch, "CapturedSteps", lambda *_: MadeUpSteps(room_rows=100))
    ways = Ways(tmp_path, "bert")
    list(ways.unpadded.capture_static())
    plain, both = UnpaddedForward.side_by_side, UnpaddedForward.by_static

    def slow_plain(self: UnpaddedForward, *given: Any) -> Any:
        clock[0] += 1.0 if faster == "unpadded" else 3.0
        return plain(self, *given)

    def slow_static(self: UnpaddedForward, *given: Any) -> Any:
        clock[0] += 2.0
        return both(self, *given)

    monkeypatch.setattr(UnpaddedForward, "side_by_side", slow_plain)
    monkeypatch.setattr(UnpaddedForward, "by_static", slow_static)
    ran: list[str] = []
    for seed in range(2 * TIMED_BATCHES + 4):
        items = [TokenizedInput(tuple(range(5, 15 + seed % 3)))]
        with torch.inference_mode():
            ways.unpadded(items, [seed % 3])
        ran.append(ways.unpadded.ran)
    assert ran[: 2 * TIMED_BATCHES] == ["static", "unpadded"] * TIMED_BATCHES
    assert ran[2 * TIMED_BATCHES :] == [faster] * 4
    with torch.inference_mode():  # another bucket is another question
        ways.unpadded([TokenizedInput(tuple(range(5, 25)))] * 3, [0, 1, 2])
    assert ways.unpadded.ran == "static"


def test_a_batch_that_cannot_run_so_is_never_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_batch, "CapturedSteps", lambda *_: MadeUpSteps(room_rows=100))
    ways = Ways(tmp_path, "bert")
    list(ways.unpadded.capture_static())
    ways.install(1, 1, rank=129)
    looked: list[float] = []

    def look() -> float:
        looked.append(0.0)
        return 0.0

    monkeypatch.setattr("time.perf_counter", look)
    items = [TokenizedInput((5, 6, 7))]
    for _ in range(3):
        with torch.inference_mode():
            ways.unpadded(items, [1])
        assert ways.unpadded.ran == "rank"
    assert not looked
    with torch.inference_mode():
        ways.unpadded(items, [0])  # the bucket is timed from its first way on
    assert ways.unpadded.ran == "static"
    assert len(looked) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_under_a_mask_keeps_numbers_apart(bad: float) -> None:
    torch.manual_seed(0)
    rows, starts = 9, torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    for seed in range(8):
        chance = random.Random(seed)
        heads, shared = chance.choice([(2, 1), (4, 2)])
        query, key, value = (
            torch.randn(rows, many, 8) for many in (heads, heads // shared, heads // shared)
        )
        window, causal = chance.choice([None, 2]), chance.random() < 0.5
        texts = StaticTexts(starts, 5, attend_under_mask)
        wanted = attend_under_mask(query, key, value, texts, None, window, causal)
        plain = TextBounds((4, 5), torch.tensor([0, 4, 9]), attend_text_by_text)
        theirs = attend_text_by_text(query, key, value, plain, None, window, causal)
        assert torch.allclose(wanted, theirs, atol=1e-5)
        (key, value)[seed % 2][2, 0, 3] = bad
        found = attend_under_mask(query, key, value, texts, None, window, causal)
        assert torch.equal(found[4:], wanted[4:])
        assert not torch.isfinite(found[2]).any()


def test_memory_that_ends_leaves_fewer_buckets_and_right_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeUpSteps(room_rows=32)
    monkeypatch.setattr(static_batch, "CapturedSteps", lambda *_: made)
    ways = Ways(tmp_path, "bert")
    list(ways.unpadded.capture_static())
    assert {key.rows for key in made.runs} == {16, 32}
    assert made.refused == [MOST_TOKENS, 64]
    kinds = set()
    for seed in range(6):
        items, slots = random_batch(seed)
        with torch.inference_mode():
            found, wanted = ways.unpadded(items, slots), ways.padded(items, slots)
        fits = sum(len(one.token_ids) for one in items) <= 32
        assert (ways.unpadded.ran == "uncaptured") != fits
        kinds.add(fits)
        shown = found.mask == 1
        assert torch.allclose(found.hidden[shown], wanted.hidden[shown], atol=5e-4)
    assert kinds == {True, False}


def test_what_little_was_captured_is_compared_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeUpSteps(room_rows=16)
    monkeypatch.setattr(static_batch, "CapturedSteps", lambda *_: made)
    ways = Ways(tmp_path, "bert")
    for slot in (1, 2):
        ways.base.adapted.uninstall(slot)
    list(ways.unpadded.capture_static())
    assert static_fault(ways.base, ways.unpadded, ways.padded) is None
    plain = ways.static.run

    def wrong(key: StepKey) -> None:
        plain(key)
        ways.static.fixed()[2].mul_(1.01)

    for key in made.runs:
        made.runs[key] = partial(wrong, key)
    told = static_fault(ways.base, ways.unpadded, ways.padded)
    assert told is not None
    assert "states differ" in told


@pytest.mark.parametrize("error", [CannotCapture("operation not permitted\nwhen capturing"), None])
def test_a_device_that_captures_nothing_leaves_all_as_it_was(
    error: Exception | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot(self: CapturedSteps, key: StepKey, run: Callable[[], None]) -> bool:
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(CapturedSteps, "possible", True)
    monkeypatch.setattr(CapturedSteps, "capture", cannot)
    tasks = {"a": "text-classification"}
    lane = Lane(tmp_path, "bert", tasks, encode_batches="static", max_batch_tokens=64)
    lines = [one.getMessage() for one in caplog.records if "static" in one.getMessage()]
    assert lines == [
        "No batch of texts is static: memory ended before any was captured"
        if error is None
        else "No batch of texts is static: CannotCapture: operation not permitted when capturing"
    ]
    assert not lane.lane.figures().static_bytes
    lane.lane.submit(lane.request("1", "a", tasks["a"], ["a b c"]))
    lane.drain()
    assert set(lane.lane.figures().steps_by) == {"unpadded"}


def test_launches_and_addresses_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(tmp_path, "bert")
    layers = ways.base.adapted.modulator.static
    assert layers is not None
    ways.unpadded.by_static(*random_batch(99))  # what is allocated once, for the largest layer
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


def test_a_batch_needs_nothing_of_the_processor(tmp_path: Path) -> None:
    """On the meta device, where no number can be read and no memory of the host is at hand."""
    device = torch.device("meta")
    folder = tiny_bases.base_folder(tmp_path, "bert")
    base = load_base(tiny_bases.options(folder, tmp_path, quantization="none"))
    base.model.to(device)
    base = replace(base, device=device)
    rows = Rows(base, tiny_bases.text_of(folder))
    made = UnpaddedForward(base, rows, RopeByLength(base.model))
    assert made.make_static(4, MOST_TOKENS, MOST_TEXTS) is None
    assert made.static is not None
    for tokens in token_buckets(MOST_TOKENS):
        for rank, has_lora in LAUNCH_CLASSES:
            with Launches(()) as launches:
                made.static.run(StepKey(tokens, rank, has_lora, plain=True))
            # On the meta device every operator is there; these compute on a processor alone.
            assert not [one for one, *_ in launches.found if one.startswith("hira::")]


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


def test_a_batch_that_raises_is_run_again_the_other_way_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ways = Ways(tmp_path, "bert")
    items, slots = random_batch(2)
    tries: list[StepKey] = []
    caplog.clear()

    def raises(self: StaticBatch, key: StepKey) -> None:
        tries.append(key)
        raise RuntimeError("no such launch")

    with torch.inference_mode():
        wanted = ways.unpadded.side_by_side(items, slots).hidden
        monkeypatch.setattr(StaticBatch, "run", raises)
        for _ in range(MOST_FAILURES + 2):
            found = ways.unpadded(items, slots).hidden
            assert ways.unpadded.ran == "failed"
            assert torch.equal(found, wanted)
    assert len(tries) == MOST_FAILURES
    assert len(caplog.records) == 2
    assert not any(one.exc_info for one in caplog.records)


def test_a_text_that_breaks_both_ways_takes_the_batch_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(tmp_path, "bert")
    items, slots = random_batch(2)

    def raises(*_: object) -> None:
        raise RuntimeError("no such shape")

    with torch.inference_mode():
        with monkeypatch.context() as broken:
            broken.setattr(StaticBatch, "run", raises)
            broken.setattr(UnpaddedForward, "side_by_side", raises)
            for _ in range(MOST_FAILURES):
                with pytest.raises(RuntimeError, match="no such shape"):
                    ways.unpadded(items, slots)
        ways.unpadded(items, slots)
    assert ways.unpadded.ran == "static"


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
    assert lane.base.adapted.modulator.static is None  # no table is kept, or filled
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
    made.fill([(1, 1), (2, 31)], 32)
    with pytest.raises(ValueError, match="no room"):
        made.fill([(1, 1), (2, 1), (1, 1)], 32)


def test_buckets_hold_any_number_of_tokens() -> None:
    for most in (1, 15, 16, 17, 100, 8192):
        made = token_buckets(most)
        assert list(made) == sorted(set(made))
        assert made[-1] == most


def test_graphs_of_texts_leave_room_for_the_largest_step_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def note(*_: object, spare_bytes: int, **__: object) -> str:
        left.append(spare_bytes)
        return "tried no further"

    monkeypatch.setattr(UnpaddedForward, "make_static", note)
    made: dict[str, Any] = {"encode_batches": "static", "max_batch_tokens": 64}
    for tokens in (64, 1 << 12):
        root = tmp_path / str(tokens)
        root.mkdir()
        lane = Lane(root, "llama", {"a": "text-classification"}, **made, prefill_tokens=tokens)
        config = lane.base.backbone.config
        options = tiny_bases.options(root / "base", root, **made)
        assert left.pop() == later_bytes(options, config, torch.float32, tokens)
