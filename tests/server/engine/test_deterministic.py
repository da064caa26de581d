"""With ``deterministic``, answers of the encode lane are equal in every bit in any batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.base.load import BaseModelError
from server.engine.engine import Engine
from server.messages import EncodeRequest, EncodeResult, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.coverage_adapters import make

pytest.importorskip("peft", reason="PEFT is an extra of the project (train)")

ADAPTERS = (
    ("HiRA", "text-classification"),
    ("LoRA", "token-classification"),
    ("HiRA", "question-answering"),
)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("bits")
    base = tiny_bases.base_folder(root, "distilbert")
    found: dict[str, Any] = {"base": base}
    for method, task in ADAPTERS:
        targets = tiny_bases.TARGETS["distilbert"]
        folder = make(root / task, base, task, method, targets)
        found[task] = tiny_bases.stored(root / "store", folder)
    return found


@pytest.fixture
def engine(versions: dict[str, Any]) -> Iterator[Engine]:
    base: Path = versions["base"]
    made = tiny_bases.options(
        base, base.parent / "store", quantization="nf4", dtype="fp32", deterministic=True
    )
    built = Engine.build(made)
    yield built
    built.close()


def test_answers_are_the_same_alone_and_in_any_batch(
    engine: Engine, versions: dict[str, Any]
) -> None:
    chance = random.Random(3)
    words = range(5, 60)
    asked: list[EncodeRequest] = []
    for number in range(16):
        ids = tuple(chance.choice(words) for _ in range(chance.choice([3, 8, 8, 17])))
        task = chance.choice([*versions.keys() - {"base"}, "feature-extraction"])
        item = TokenizedInput(
            ids,
            text="x" * len(ids),
            offsets=tuple((place, place + 1) for place in range(len(ids))),
            type_ids=tuple(int(place > len(ids) // 2) for place in range(len(ids))),
        )
        version = versions.get(task)
        asked.append(EncodeRequest(f"q{number}", task, version, version, (item,)))  # type: ignore[arg-type]
    alone = {one.id: engine.run(one) for one in asked}
    assert all(isinstance(one, EncodeResult) for one in alone.values())
    for _ in range(4):
        order = chance.sample(asked, len(asked))
        for one in order:
            engine.submit(one)
        found: dict[str, Any] = {}
        steps = 0
        while len(found) < len(order):
            steps += 1
            found |= {event.id: event for event in engine.step()}
        assert steps < len(order)
        for key, event in found.items():
            expected: Any = alone[key]
            assert event.outputs == expected.outputs, key


def test_a_gpu_is_refused(versions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base: Path = versions["base"]
    monkeypatch.setattr("server.base.load.choose_device", lambda options: torch.device("cuda", 0))
    made = tiny_bases.options(base, base.parent / "store", deterministic=True)
    with pytest.raises(BaseModelError, match="single bit"):
        Engine.build(made)
