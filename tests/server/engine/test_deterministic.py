"""With ``deterministic``, answers of the encode lane are equal in every bit in any batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import Engine
from server.messages import EncodeRequest, EncodeResult, TokenizedInput
from server.options import runs_apart
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


def test_on_a_gpu_each_text_has_a_forward_of_its_own(
    versions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.encoding.lane.runs_apart", lambda options, _: True)
    base: Path = versions["base"]
    made = tiny_bases.options(
        base, base.parent / "store", quantization="nf4", dtype="fp32", deterministic=True
    )
    engine = Engine.build(made)
    rows: list[int] = []

    def note(module: Any, args: Any, given: Any) -> None:
        rows.append(len(given["input_ids"]))

    engine.base.backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        texts = ["a b", "a c", "a b c d"]
        wanted = [engine.encode([one], task="feature-extraction").outputs[0] for one in texts]
        assert list(engine.encode(texts, task="feature-extraction").outputs) == wanted
    finally:
        engine.close()
    assert rows == [1] * 6


def test_only_a_gpu_runs_requests_apart(tmp_path: Path) -> None:
    plain = tiny_bases.options(tmp_path, tmp_path)
    exact = tiny_bases.options(tmp_path, tmp_path, deterministic=True)
    assert [runs_apart(one, "cuda") for one in (plain, exact)] == [False, True]
    assert not runs_apart(exact, "cpu")
