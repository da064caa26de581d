"""What is compared before static steps answer, where the two paths have an attention in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.generation.attention import Call
from server.generation.page_attention import Pages, decode_in_torch
from server.generation.step_buffers import RowNumbers, StepBuffers
from tests.stand import dense
from tests.stand.dense import Stage
from tests.stand.row_attention import attend_row_by_row
from tests.stand.static_steps import staged

PROMPT = [5, 6, 7, 8]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def empty_stage() -> Stage:
    stage, adapted = staged(max_sequences=3)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    return stage


def tokens_of(stage: Stage) -> list[int]:
    answer = stage.answer(None, PROMPT, max_new_tokens=4, ignore_eos=True)
    return [one.id for one in answer.tokens]


@pytest.fixture
def torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """Pages as the kernel of torch takes them, and a stand-in for it: by the most rows of a
    sequence, what its answers are multiplied by."""
    from torch.nn.attention import varlen as torchs

    def stand_in(factor: Callable[[int], float]) -> None:
        def attend(*given: Any, **named: Any) -> None:
            out, query, keys, values, starts, _, most_rows, _ = given
            call = Call(query, keys, values, out, named["scale"], None)
            pages = Pages(keys, values, named["block_table"], named["seqused_k"], None)
            attend_row_by_row(call, pages, starts, most_rows)
            out.mul_(factor(most_rows))

        monkeypatch.setattr(torchs, "varlen_attn_out", attend)
        monkeypatch.setattr("server.generation.lane.page_tokens_of", lambda *_: 256)

    return stand_in


def raises(_: int) -> float:
    raise RuntimeError("no kernel image for this device")


def test_steps_by_a_kernel_that_is_right_are_used(
    torchs_kernel: Callable[[Callable[[int], float]], None],
) -> None:
    wanted = tokens_of(empty_stage())
    torchs_kernel(lambda _: 1.0)
    stage = empty_stage()
    stage.lane.start_steps()
    assert tokens_of(stage) == wanted
    assert stage.lane.figures().steps_by["static"] == 3


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(raises, id="raises"),
        pytest.param(lambda _: 1.1, id="wrong"),
        pytest.param(lambda most_rows: 1.1 if most_rows > 1 else 1.0, id="wrong in prompts"),
        pytest.param(lambda most_rows: 1.1 if most_rows == 1 else 1.0, id="wrong in steps"),
        pytest.param(
            lambda most_rows: 1.1 if 1 < most_rows < 5 else 1.0, id="wrong in the end of a prompt"
        ),
    ],
)
def test_a_kernel_that_is_wrong_agrees_with_itself_and_is_not_used(
    factor: Callable[[int], float],
    torchs_kernel: Callable[[Callable[[int], float]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = tokens_of(empty_stage())
    torchs_kernel(factor)
    stage = empty_stage()
    stage.lane.start_steps()
    assert "Decode steps stay dynamic" in caplog.text
    assert tokens_of(stage) == wanted
    assert dict(stage.lane.figures().steps_by) == {"differs": 4}
    assert stage.lane.figures().kv_blocks_used == 0


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_longer_than_a_page_and_a_window_is_compared(
    window: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if window is not None:
        kinds = ["full_attention", "sliding_attention"]
        made = dense.base("llama", sliding_window=window, layer_types=kinds)
        monkeypatch.setattr(dense, "base", lambda _: made)

    def wrong(call: Call, pages: Pages) -> None:
        if window is None:
            pages = replace(pages, lengths=pages.lengths.clamp(max=16))
        decode_in_torch(call, replace(pages, window=None))

    right = empty_stage()
    right.lane.start_steps()
    tokens_of(right)
    assert right.lane.figures().steps_by["static"] == 3
    monkeypatch.setattr("server.generation.forward.decode_in_torch", wrong)
    stage = empty_stage()
    stage.lane.start_steps()
    assert "differ" in caplog.text
    assert stage.lane.figures().steps_by["static"] == 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature", lambda one: 1.0),
        ("top_k", lambda one: 0),
        ("top_p", lambda one: 1.0),
        ("min_p", lambda one: 0.0),
        ("point", lambda one: (one.point + 0.3) % 1.0),
        ("seat", lambda one: 3),  # nobody's: what a sequence has had is not known
    ],
)
def test_steps_that_draw_otherwise_are_never_used(
    name: str,
    wrong: Callable[[RowNumbers], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = StepBuffers.fill

    def fill(self: StepBuffers, numbers: Sequence[RowNumbers]) -> None:
        plain(self, [replace(one, **{name: wrong(one)}) for one in numbers])

    monkeypatch.setattr(StepBuffers, "fill", fill)
    stage = empty_stage()
    stage.lane.start_steps()
    assert "tokens or log-probabilities differ" in caplog.text
    tokens_of(stage)
    assert dict(stage.lane.figures().steps_by) == {"differs": 4}


@pytest.mark.parametrize("wrong", [False, True])
def test_temperature_is_seen_in_half_precision_where_nothing_is_cut(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dense.base("llama").to(torch.bfloat16)
    monkeypatch.setattr(dense, "base", lambda _: made)
    plain = StepBuffers.fill

    def fill(self: StepBuffers, numbers: Sequence[RowNumbers]) -> None:
        uncut = [one.top_k == 0 and one.sampled for one in numbers]
        plain(
            self,
            [
                replace(one, temperature=1.0) if all_kept else one
                for one, all_kept in zip(numbers, uncut, strict=True)
            ],
        )

    if wrong:
        monkeypatch.setattr(StepBuffers, "fill", fill)
    stage, adapted = staged(max_sequences=3)
    for slot in (1, 2, 3):
        adapted.uninstall(slot)
    stage.lane.start_steps()
    stage.answer(None, PROMPT, max_new_tokens=2, ignore_eos=True)
    assert bool(stage.lane.figures().steps_by["static"]) != wrong
