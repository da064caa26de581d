"""Heads that run as one, vectors pooled together and answers in one copy: as one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.base.load import load_base
from server.encoding import head_stacks, postprocess, read
from server.encoding.read import BatchStates, Reader, in_one_copy, pooled_states
from server.encoding.way_times import HEAD_WAYS, TIMED_BATCHES, HeadWay
from server.messages import EncodeResult, Failure
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane

TASKS = {
    **{f"cls{n}": "text-classification" for n in range(4)},
    **{f"ner{n}": "token-classification" for n in range(2)},
    **{f"qa{n}": "question-answering" for n in range(2)},
}


def asked(lane: Lane, chance: random.Random, count: int = 30) -> list[Any]:
    """Requests of every task on random adapters, and vectors of the bare base."""
    made = []
    for number in range(count):
        version = chance.choice([None, *TASKS])
        task = "feature-extraction" if version is None else TASKS[version]
        more: dict[str, Any] = {}
        if chance.random() < 0.3:
            task = "feature-extraction"
        if task == "feature-extraction":
            more["options"] = {
                "pooling": chance.choice(["mean", "cls", "last"]),
                "normalize": chance.random() < 0.5,
            }
        texts: Any = tiny_bases.texts(chance.randint(1, 3), seed=number, longest=14)
        if task == "question-answering":
            texts = [(one, two) for one, two in zip(texts, reversed(texts), strict=True)]
        made.append(lane.request(f"q{number}", version, task, texts, **more))
    return made


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
def test_answers_are_those_of_heads_that_run_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(tmp_path, kind, TASKS)
    stacks: list[int] = []
    plain: Callable[..., Any] = head_stacks.logits_together

    def counted(heads: Any, batch: Any) -> Any:
        stacks.append(len(heads))
        return plain(heads, batch)

    monkeypatch.setattr(read, "logits_together", counted)
    try:
        for seed in range(3):
            found: list[dict[str, Any]] = []
            for where in (frozenset({"cuda"}), frozenset({"cpu"})):
                monkeypatch.setattr(read, "TOGETHER_ON", where)
                most = 1 << 30 if "cpu" in where else 0
                monkeypatch.setattr(read, "STACKED_HEAD_BYTES", {"cpu": most})
                for one in asked(lane, random.Random(seed)):
                    lane.lane.submit(one)
                found.append(lane.drain())
            for name, wanted in found[0].items():
                assert isinstance(wanted, EncodeResult), wanted
                for mine, theirs in zip(found[1][name].outputs, wanted.outputs, strict=True):
                    tiny_bases.assert_close(mine, theirs)
    finally:
        lane.residency.close()
    assert max(stacks) >= 3


def test_a_head_that_is_not_finite_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(tmp_path, "distilbert", {name: TASKS[name] for name in ("cls0", "cls1", "cls2")})
    monkeypatch.setattr(read, "TOGETHER_ON", frozenset({"cpu"}))
    lane.weights["cls1"].head["classifier.weight"].fill_(float("nan"))
    try:
        for name in lane.weights:
            lane.lane.submit(lane.request(name, name, TASKS[name], ["a text"]))
        ends = lane.drain()
    finally:
        lane.residency.close()
    assert isinstance(ends["cls1"], Failure)
    assert ends["cls1"].code == "adapter_failed"
    assert all(isinstance(ends[name], EncodeResult) for name in ("cls0", "cls2"))


def test_heads_that_cannot_run_together_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lane = Lane(tmp_path, "distilbert", {name: TASKS[name] for name in ("cls0", "cls1")})
    monkeypatch.setattr(read, "TOGETHER_ON", frozenset({"cpu"}))
    tried: list[int] = []

    def cannot(heads: Any, batch: Any) -> Any:
        tried.append(len(heads))
        raise RuntimeError("vmap: it looked\nat a number")

    monkeypatch.setattr(read, "logits_together", cannot)
    try:
        for turn in range(2):
            for name in lane.weights:
                lane.lane.submit(lane.request(f"{name} {turn}", name, TASKS[name], ["a text"]))
            assert all(isinstance(one, EncodeResult) for one in lane.drain().values())
    finally:
        lane.residency.close()
    assert tried == [2]  # it is said, and tried, once
    (line,) = [one.getMessage() for one in caplog.records if "one by one" in one.getMessage()]
    assert "it looked at a number" in line


def ask_all(lane: Lane, turn: str, names: Any = None) -> dict[str, Any]:
    """One request of each adapter; the answers."""
    for name in names or lane.weights:
        lane.lane.submit(lane.request(f"{name} {turn}", name, TASKS["cls0"], ["a text"]))
    return lane.drain()


@pytest.mark.parametrize("faster", ["together", "apart"])
def test_where_nobody_measured_the_faster_way_is_found_on_the_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: HeadWay
) -> None:
    lane = Lane(tmp_path, "distilbert", {name: TASKS[name] for name in ("cls0", "cls1", "cls2")})
    ask_all(lane, "loads")  # from now on all of them are in one batch
    monkeypatch.setattr(read, "STACKED_HEAD_BYTES", {})
    clock, ran = [0.0], list[str]()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    for way in HEAD_WAYS:
        plain: Callable[..., Any] = getattr(head_stacks, f"logits_{way}")

        def slow(heads: Any, batch: Any, *, way: HeadWay = way, plain: Any = plain) -> Any:
            ran.append(way)
            clock[0] += 1.0 if way == faster else 2.0
            return plain(heads, batch)

        monkeypatch.setattr(head_stacks, f"logits_{way}", slow)
    wanted: list[Any] = []
    try:
        for turn in range(1 + 2 * TIMED_BATCHES + 3):
            ends = ask_all(lane, str(turn))
            found = [ends[f"{name} {turn}"].outputs for name in lane.weights]
            wanted = wanted or found
            for mine, theirs in zip(found, wanted, strict=True):
                tiny_bases.assert_close(mine[0], theirs[0])
    finally:
        lane.residency.close()
    assert ran[:2] == ["apart", "together"]  # compared
    assert sorted(ran[2 : 2 + 2 * TIMED_BATCHES]) == sorted(HEAD_WAYS * TIMED_BATCHES)
    assert ran[2 + 2 * TIMED_BATCHES :] == [faster] * 3


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view
        return func(*args, **(kwargs or {}))


def test_launches_of_heads_do_not_grow_with_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(tmp_path, "distilbert", {f"cls{n}": TASKS["cls0"] for n in range(4)})
    ask_all(lane, "loads")
    monkeypatch.setattr(read, "STACKED_HEAD_BYTES", {"cpu": 1 << 30})
    ways = {way: getattr(head_stacks, f"logits_{way}") for way in HEAD_WAYS}
    launches: dict[str, list[int]] = {way: [] for way in HEAD_WAYS}

    def counted(heads: Any, batch: Any) -> Any:
        for way, run in ways.items():
            with _Counted() as mode:
                found = run(heads, batch)
            launches[way].append(mode.launches)
        return found

    monkeypatch.setattr(read, "logits_together", counted)
    try:
        for count in (2, 4):
            ask_all(lane, str(count), list(lane.weights)[:count])
    finally:
        lane.residency.close()
    few, many = launches["together"]
    assert few == many > 3
    few, many = launches["apart"]
    assert many == 2 * few


def test_heads_that_give_something_else_together_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lane = Lane(tmp_path, "distilbert", {name: TASKS[name] for name in ("cls0", "cls1")})
    ask_all(lane, "loads")
    monkeypatch.setattr(read, "STACKED_HEAD_BYTES", {})
    plain: Callable[..., Any] = head_stacks.logits_together

    def off(heads: Any, batch: Any) -> Any:
        return [one * 1.01 for one in plain(heads, batch)]

    monkeypatch.setattr(head_stacks, "logits_together", off)
    try:
        assert all(isinstance(one, EncodeResult) for one in ask_all(lane, "").values())
    finally:
        lane.residency.close()
    assert "their logits are others when they run as one" in caplog.text


def test_states_pooled_together_are_those_of_each_row() -> None:
    torch.manual_seed(3)
    hidden = torch.randn(9, 7, 16)
    lengths = [7, 1, 3, 5, 2, 7, 4, 6, 3]
    mask = torch.tensor([[1] * one + [0] * (7 - one) for one in lengths])
    modes: list[postprocess.Pooling] = ["mean", "cls", "last"] * 3
    hidden[1, 3:] = float("nan")  # padding is nobody's
    hidden[4, 1, 2] = float("inf")
    found = pooled_states(hidden, mask, modes)
    for row, (length, mode) in enumerate(zip(lengths, modes, strict=True)):
        if row == 4:
            assert torch.isnan(found[row]).all()
            continue
        wanted = postprocess.embed(hidden[row, :length], pooling=mode, normalize=False)
        assert torch.allclose(found[row], torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_vectors_are_read_together_only_if_they_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    base = load_base(tiny_bases.options(tiny_bases.base_folder(tmp_path, "distilbert"), tmp_path))
    reader = Reader(base, tiny_bases.text_of(base.folder), heads_kept=2, head_bytes=1 << 20)
    plain = read.pooled_states
    monkeypatch.setattr(read, "pooled_states", lambda *given: plain(*given) * (1 + off))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    states = BatchStates(torch.randn(2, 3, 8), None, mask, mask)
    assert not reader.is_together
    assert reader.compare_together(states) == pytest.approx(off, abs=1e-5)
    assert reader.is_together == (off == 0.0)


def test_one_copy_brings_every_tensor_in_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(3, 4), torch.randn(2), torch.randn(0, 5), torch.randn(2, 3, 2).bfloat16()]
    copies: list[int] = []
    plain = torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        copies.append(self.numel())
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    found = in_one_copy(values, together=True)
    assert copies == [12 + 2 + 12]
    for mine, theirs in zip(found, values, strict=True):
        assert torch.equal(mine, theirs.float())
    assert in_one_copy([], together=True) == []
    apart = in_one_copy(values, together=False)
    assert all(mine is theirs for mine, theirs in zip(apart, values, strict=True))


def test_large_heads_on_a_cpu_and_those_of_deterministic_answers_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(heads: Any, batch: Any) -> Any:
        raise AssertionError("heads ran together")

    monkeypatch.setattr(read, "logits_together", never)
    for name, changes, most in (("plain", {}, 8), ("exact", {"deterministic": True}, 1 << 30)):
        monkeypatch.setattr(read, "STACKED_HEAD_BYTES", {"cpu": most})
        tasks = {name: TASKS[name] for name in ("cls0", "cls1")}
        lane = Lane(tmp_path / name, "distilbert", tasks, **changes)
        try:
            for one in lane.weights:
                lane.lane.submit(lane.request(one, one, TASKS[one], ["a text"]))
            assert all(isinstance(one, EncodeResult) for one in lane.drain().values())
        finally:
            lane.residency.close()
