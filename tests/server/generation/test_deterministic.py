"""With ``deterministic``, no bit of a logit depends on who else is in the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.layers.inject import inject
from adapters.modulation.fixed_blocks import FixedBlocks
from adapters.modulation.folded import FoldedCache
from adapters.modulation.slot_factors import SlotFactors
from server.generation.forward import PagedForward
from server.generation.lane import GenerateLane
from tests.stand.dense import VOCABULARY, Stage, hira_factors, options, terminals

VERSIONS: list[str | None] = [None, "a", "b", "c"]
Logits = dict[tuple[str, int], torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def staged(
    dtype: torch.dtype, *, deterministic: bool = True, blocks: bool = True, folded: int = 1 << 16
) -> Stage:
    stage = Stage()
    model = copy.deepcopy(stage.adapted.original).to(dtype)
    adapted = inject(model, name="test")
    if deterministic and blocks:
        adapted.modulator.fixed = FixedBlocks()
    adapted.modulator.folded = FoldedCache(folded, torch.device("cpu"))  # some, not all
    residency: Any = stage.residency
    made = options(deterministic=deterministic, prefill_tokens=16)
    stage.lane = GenerateLane(adapted, stage.tokenizer, residency, made)
    for version, slot in stage.residency.slots.items():
        pairs = hira_factors(stage.adapted.original, slot)
        method: Any = "lora" if version == "c" else "hira"
        factors = {p: SlotFactors(method, a.to(dtype), b.to(dtype)) for p, (a, b) in pairs.items()}
        adapted.install(slot, factors)
        stage.residency.prefetch(version)
    return stage


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Logits of every token that was predicted: by request and length of its text."""
    found: Logits = {}
    plain = PagedForward.__call__

    def watched(self: PagedForward, parts: Any) -> Any:
        logits = plain(self, parts)
        predicting = [part.sequence for part in parts if part.predicts]
        for row, one in zip(logits.last, predicting, strict=True):
            found[one.request.id, len(one.ids)] = row.clone()
        return logits

    monkeypatch.setattr(PagedForward, "__call__", watched)
    return found


def asked(chance: random.Random, count: int) -> list[tuple[str | None, list[int]]]:
    return [
        (
            chance.choice(VERSIONS),
            [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 50))],
        )
        for _ in range(count)
    ]


def mixed(stage: Stage, requests: list[Any], chance: random.Random) -> None:
    """All of them, in a random order and at random times."""
    waiting = list(enumerate(requests))
    chance.shuffle(waiting)
    ends: list[Any] = []
    while waiting or stage.lane.has_work():
        for _ in range(chance.randint(0, 4)):
            if waiting:
                number, (version, prompt) = waiting.pop()
                stage.submit(version, prompt, id=f"q{number}", max_new_tokens=6, ignore_eos=True)
        ends += terminals(stage.lane.step())
    assert len(ends) == len(requests)
    assert not [one for one in ends if hasattr(one, "code")]


def test_a_forward_for_each_sequence_gives_the_same_bits(
    seen: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.generation.lane.runs_apart", lambda options, _: True)
    stage = staged(torch.float32, blocks=False, folded=0)
    chance = random.Random(8)
    requests = asked(chance, 10)
    for number, (version, prompt) in enumerate(requests):
        stage.answer(version, prompt, id=f"q{number}", max_new_tokens=6, ignore_eos=True)
    alone = dict(seen)
    seen.clear()
    steps = stage.lane.figures().steps
    mixed(stage, requests, chance)
    assert stage.lane.figures().steps - steps < len(alone)  # a step is one, whatever is in it
    assert seen.keys() == alone.keys()
    for key, row in seen.items():
        assert torch.equal(row, alone[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_same_alone_and_in_any_batch(dtype: torch.dtype, seen: Logits) -> None:
    chance = random.Random(7)
    stage = staged(dtype)
    requests = asked(chance, 14)
    for number, (version, prompt) in enumerate(requests):
        stage.answer(version, prompt, id=f"q{number}", max_new_tokens=6, ignore_eos=True)
    alone = dict(seen)
    assert len(alone) == 14 * 6
    for _ in range(3):
        seen.clear()
        mixed(stage, requests, chance)
        assert seen.keys() == alone.keys()
        for key, row in seen.items():
            assert torch.equal(row, alone[key]), key


def test_without_it_some_bits_differ(seen: Logits) -> None:
    chance = random.Random(7)
    stage = staged(torch.float32, deterministic=False)
    requests = asked(chance, 14)
    for number, (version, prompt) in enumerate(requests):
        stage.answer(version, prompt, id=f"q{number}", max_new_tokens=6, ignore_eos=True)
    alone = dict(seen)
    seen.clear()
    mixed(stage, requests, chance)
    assert any(not torch.equal(row, alone[key]) for key, row in seen.items() if key in alone)
