"""The static step: the tokens of the other path, the same launches on the same memory each time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from adapters.layers.inject import inject
from adapters.modulation.slot_factors import SlotFactors
from server.base.captured_steps import LAUNCH_CLASSES, StepKey
from server.base.failed_steps import MOST_FAILURES
from server.generation.attention import PAGED_ATTENTION
from server.generation.forward import PagedForward
from server.generation.kv_cache import KVCache
from server.generation.page_attention import DecodeAttention, decode_by_varlen, decode_in_torch
from server.generation.static_step import StaticStep, buckets
from server.messages import Failure, GenerateResult
from server.options import DecodeSteps, EngineOptions
from server.settings import Settings
from tests.stand.dense import Stage, terminals
from tests.stand.launches import HostLook, Launches
from tests.stand.static_steps import factors_of, random_run, staged


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_the_other_path(name: str, seed: int) -> None:
    plain, static = staged(name, "dynamic"), staged(name)
    wanted, found = random_run(*plain, seed), random_run(*static, seed)
    assert wanted.keys() == found.keys()
    for key, one in wanted.items():
        other = found[key]
        assert isinstance(other, GenerateResult), other
        assert [t.id for t in other.tokens] == [t.id for t in one.tokens]
        for mine, theirs in zip(other.tokens, one.tokens, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [a.text for a in mine.alternatives] == [a.text for a in theirs.alternatives]
    ran = static[0].lane.figures().steps_by
    assert ran["static"] > 5
    assert ran["prefill"] > 0
    assert set(ran) == {"static", "prefill"}
    assert not plain[0].lane.figures().steps_by


def test_launches_and_addresses_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, adapted = staged()
    steps: dict[Any, list[list[Any]]] = {}
    plain_run = StaticStep.run

    def watched(self: StaticStep, key: Any) -> None:
        static = adapted.modulator.static
        assert static is not None
        fixed = [*self.fixed(), static.hira, static.lora, static.scales]
        with Launches(fixed) as launches:
            plain_run(self, key)
        steps.setdefault(key, []).append(launches.found)

    for layer in adapted.layers.values():  # buffers that grow once, for the largest layer
        assert layer is not None
    monkeypatch.setattr(StaticStep, "run", watched)
    random_run(stage, adapted, 1)
    random_run(stage, adapted, 2)
    assert max(map(len, steps.values())) > 8
    for runs in steps.values():
        assert len(runs[0]) > 20
        for run in runs[1:]:
            assert run == runs[0]


@pytest.mark.parametrize("attend", [decode_in_torch, decode_by_varlen])
def test_a_step_needs_nothing_of_the_processor(attend: DecodeAttention) -> None:
    """On the meta device: no number can be read, no memory of the host is at hand, and operators
    that only a processor has are not there."""
    device = torch.device("meta")
    model: Any = copy.deepcopy(Stage().adapted.original).to(torch.bfloat16).to(device)
    adapted = inject(model, name="test")
    kv = KVCache(
        model.config,
        budget_bytes=1 << 22,
        max_sequences=4,
        context_tokens=256,
        dtype=torch.bfloat16,
        device=device,
        page_tokens=256,
    )
    step = StaticStep(model, adapted.make_static(4), kv, 4, attend)
    model.set_attn_implementation(PAGED_ATTENTION)
    for rows in (1, 4):
        for rank, has_lora in LAUNCH_CLASSES:
            for plain in (True, False):
                with Launches(()) as launches:
                    step.run(StepKey(rows, rank, has_lora, plain))
                # On the meta device every operator is there; these compute on a processor alone.
                assert not [one for one, *_ in launches.found if one.startswith("hira::")]


def test_a_look_at_a_number_is_seen() -> None:
    x = torch.arange(4.0)
    for look in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        x.nonzero,
        lambda: torch.tensor([1.0, 2.0]) + x[0],
        lambda: bool((x > 0).all()),
    ):
        with pytest.raises(HostLook), Launches([]):
            look()


def test_what_a_step_cannot_do_runs_as_before_and_is_counted() -> None:
    stage, adapted = staged()
    original = stage.adapted.original
    biased = factors_of(original, 1)
    path = "model.layers.0.mlp.up_proj"
    biased[path] = replace(biased[path], bias=torch.ones(64))
    adapted.uninstall(1)
    adapted.install(1, biased)
    wide = factors_of(original, 2)
    wide[path] = SlotFactors("hira", torch.randn(129, 32) * 0.1, torch.randn(64, 129) * 0.1)
    adapted.uninstall(2)
    adapted.install(2, wide)
    for version in ("a", "b"):
        stage.answer(version, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    ran = stage.lane.figures().steps_by
    assert (ran["bias"], ran["rank"], ran["static"]) == (3, 3, 0)


def test_a_broken_adapter_fails_alone_inside_a_step() -> None:
    stage, adapted = staged()
    broken = factors_of(stage.adapted.original, 1)
    for entry in broken.values():
        entry.a.mul_(1e30)
    adapted.uninstall(1)
    adapted.install(1, broken, checked=True)
    want = [5, 6, 7]
    alone = stage.answer("b", want, ignore_eos=True)
    for version in ("a", "b", None):
        stage.submit(version, want, ignore_eos=True, id=f"of {version}")
    ends = {one.id: one for one in terminals(stage.drain())}
    assert ends["of a"].code == "adapter_failed"
    assert [t.id for t in ends["of b"].tokens] == [t.id for t in alone.tokens]


@pytest.mark.parametrize("steps", ["static", "ahead"])
def test_a_step_that_raises_is_run_again_the_other_way_and_not_for_ever(
    steps: DecodeSteps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, _ = staged(steps=steps)
    wanted = stage.answer("a", [5, 6, 7], ignore_eos=True)
    before = stage.lane.figures().steps_by["failed"]
    tries: list[Any] = []

    def raises(self: StaticStep, key: Any) -> None:
        tries.append(key)
        raise RuntimeError("no such launch")

    monkeypatch.setattr(StaticStep, "run", raises)
    found = stage.answer("a", [5, 6, 7], ignore_eos=True)
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens]
    assert len(tries) == MOST_FAILURES
    assert stage.lane.figures().steps_by["failed"] - before == len(wanted.tokens) - 1
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "no such launch" in lines[0]
    assert "is not tried again" in lines[1]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("steps", ["static", "ahead"])
def test_an_adapter_that_breaks_both_ways_takes_the_step_from_nobody(
    steps: DecodeSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _ = staged(steps=steps)

    def raises(*_: object) -> None:
        raise RuntimeError("no such shape")

    for _ in range(MOST_FAILURES):
        stage.submit("a", [5, 6, 7], ignore_eos=True)
        stage.lane.step()  # the prompt
        with monkeypatch.context() as broken:
            broken.setattr(StaticStep, "run", raises)
            broken.setattr(PagedForward, "__call__", raises)
            (end,) = terminals(stage.drain())
        assert isinstance(end, Failure)
    before = stage.lane.figures().steps_by["failed"]
    stage.answer("a", [5, 6, 7], ignore_eos=True)
    assert stage.lane.figures().steps_by["failed"] == before


def test_a_step_that_failed_forgets_no_token_for_the_penalty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wish: dict[str, Any] = {
        "ignore_eos": True, "max_new_tokens": 14, "repetition_penalty": 1.8, "do_sample": True,
        "seed": 4, "temperature": 0.6,
    }  # fmt: skip
    plain, _ = staged(steps="dynamic")
    wanted = plain.answer("a", [5, 6, 7], **wish)
    stage, _ = staged()
    run, calls = StaticStep.run, iter(range(99))
    noted: list[bool] = []

    def sometimes(self: StaticStep, key: Any) -> None:
        if next(calls) in (2, 5):
            raise RuntimeError("no such launch")
        run(self, key)
        buffers = self.buffers
        seen = buffers.seen[buffers.seats(1)[0]].nonzero().flatten().tolist()
        read = [5, 6, 7, *(one.id for one in wanted.tokens)][: int(buffers.positions(1)[0]) + 1]
        noted.append(seen == sorted(set(read)))  # what is raised here is taken for a failed step

    monkeypatch.setattr(StaticStep, "run", sometimes)
    found = stage.answer("a", [5, 6, 7], **wish)
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens]
    assert noted == [True] * 11


def test_swaps_change_tables_and_no_memory() -> None:
    stage, adapted = staged()
    static = adapted.modulator.static
    assert static is not None
    addresses = [one.data_ptr() for one in (static.hira, static.lora, static.scales)]
    for swap in range(40):
        adapted.uninstall(1)
        adapted.install(1, factors_of(stage.adapted.original, swap))
    assert [one.data_ptr() for one in (static.hira, static.lora, static.scales)] == addresses
    assert len({int(n) for n in static.hira[1, :, 2]} - {0}) == 1


def test_buckets_hold_any_number_of_rows() -> None:
    for most in (1, 2, 7, 8, 9, 16, 17, 64, 100):
        made = buckets(most)
        assert list(made) == sorted(set(made))
        assert made[-1] == most
        assert made[0] == 1


# Before anybody is answered


def test_steps_are_compared_before_they_answer() -> None:
    stage, adapted = staged()
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    figures = stage.lane.figures()
    assert figures.steps_by["static"] == 3
    assert figures.kv_blocks_used == 0
    assert figures.static_bytes["buffers"] > 0
    assert figures.static_bytes["graphs"] == 0


def test_steps_that_differ_are_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, adapted = staged()
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    plain_run = StaticStep.run

    def wrong(self: StaticStep, key: Any) -> None:
        plain_run(self, key)
        self.buffers.told_scores[0] += 0.01

    monkeypatch.setattr(StaticStep, "run", wrong)
    stage.lane.start_steps()
    assert "differ" in caplog.text
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert dict(stage.lane.figures().steps_by) == {"differs": 4}


@pytest.mark.parametrize("plain", [True, False])
def test_steps_that_choose_other_tokens_are_never_used(
    plain: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, adapted = staged()
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    right = StaticStep.run

    def wrong(self: StaticStep, key: StepKey) -> None:
        right(self, key)
        if key.plain == plain:
            self.buffers.told_ids[0] += 1

    wanted = stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    monkeypatch.setattr(StaticStep, "run", wrong)
    stage.lane.start_steps()
    assert "differ" in caplog.text
    found = stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert [t.id for t in found.tokens] == [t.id for t in wanted.tokens]
    assert stage.lane.figures().steps_by["differs"] == 4


@pytest.mark.parametrize(("slots", "most"), [(1, 4), (2, 1), (2, 2)])
def test_steps_are_compared_as_far_as_slots_and_sequences_go(slots: int, most: int) -> None:
    stage, adapted = staged(slots=slots, max_sequences=most)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert stage.lane.figures().steps_by["static"] == 3


def test_steps_that_cannot_be_compared_are_never_used(caplog: pytest.LogCaptureFixture) -> None:
    stage, adapted = staged(kv_bytes=2 * 16 * 2 * 2 * 16 * 4 * 2)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    assert "no room for the sequences that are compared" in caplog.text
    stage.answer(None, [5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert dict(stage.lane.figures().steps_by) == {"differs": 4}


def test_nobody_has_static_steps_who_did_not_ask() -> None:
    options = {one.name: one.default for one in fields(EngineOptions)}
    settings = {name: one.default for name, one in Settings.model_fields.items()}
    for defaults in (options, settings):
        assert defaults["decode_steps"] == defaults["encode_batches"] == "dynamic"


def test_without_the_setting_nothing_is_prepared() -> None:
    stage, _ = staged(steps="dynamic")
    stage.lane.start_steps()
    stage.answer(None, [5, 6, 7], max_new_tokens=2)
    assert not stage.lane.figures().steps_by
    assert not stage.lane.figures().static_bytes
