"""Text ranking: the scores of cross-encoders, against PEFT alone and in a mixture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters.intake.checkpoint import load_adapter
from server.engine.engine import Engine, EngineFailure
from server.messages import EncodeRequest, EncodeResult
from tests.stand import tiny_bases

KINDS = ("bert", "distilbert", "llama")
LONGEST = 40  # tokens, and texts of both sides are longer


@dataclass
class World:
    base: Path
    folders: dict[str, Path]
    versions: dict[str, str]
    engine: Engine

    def scores(
        self, name: str, pairs: list[tuple[str, str]], *, side: Any = None, **options: Any
    ) -> list[float]:
        """By the engine; with ``side``, pairs that are too long are cut there."""
        text = self.engine.text
        inputs = text.tokenize(pairs, "text-ranking", truncation=side is not None, side=side)
        request = EncodeRequest(
            "ranked", "text-ranking", name, self.versions[name], inputs, options=options
        )
        result = self.engine.run(request)
        assert isinstance(result, EncodeResult)
        return list(result.outputs)


@pytest.fixture(scope="module", params=KINDS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp(request.param)
    base, store = tiny_bases.base_folder(root, request.param), root / "store"
    folders = {
        "relevant": tiny_bases.adapter(
            root / "relevant", base, "text-ranking", labels=("LABEL_0",), seed=1
        ),
        "similar": tiny_bases.adapter(
            root / "similar", base, "text-ranking", labels=("score",), method="lora",
            problem_type="regression", seed=2,
        ),
        "mood": tiny_bases.adapter(root / "mood", base, "text-classification", seed=3),
    }  # fmt: skip
    versions = {name: tiny_bases.stored(store, folder) for name, folder in folders.items()}
    engine = Engine.build(tiny_bases.options(base, store, max_input_tokens=LONGEST))
    yield World(base, folders, versions, engine)
    engine.close()


def pairs(count: int, seed: int, longest: int = 14) -> list[tuple[str, str]]:
    first = tiny_bases.texts(count, seed=seed, longest=longest)
    return list(zip(first, tiny_bases.texts(count, seed=seed + 1, longest=longest), strict=True))


def alone(
    world: World, name: str, asked: list[tuple[str, str]], *, side: str | None = None
) -> torch.Tensor:
    """Logits by PEFT on transformers' own class, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    if side is not None:
        tokenizer.truncation_side = side
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        world.base, num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, world.folders[name]).eval()
    found = []
    for first, second in asked:
        encoded = tokenizer(
            first, second, return_tensors="pt", truncation=side is not None, max_length=LONGEST
        )
        if not hasattr(model.config, "type_vocab_size"):
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            found.append(model(**encoded).logits[0, 0])
    return torch.stack(found)


def test_a_head_with_one_output_ranks_whatever_its_problem_type(world: World) -> None:
    signature = world.engine.base.adapted.signature
    tasks = {name: load_adapter(one, signature).task for name, one in world.folders.items()}
    assert tasks == {
        "relevant": "text-ranking",
        "similar": "text-ranking",
        "mood": "text-classification",
    }


@pytest.mark.parametrize("name", ["relevant", "similar"])
def test_scores_are_those_of_peft_and_transformers_alone(world: World, name: str) -> None:
    asked = pairs(9, seed=5)
    wanted = alone(world, name, asked)
    assert wanted.std() > 0.05, "the pairs must differ"
    raw = torch.tensor(world.scores(name, asked, raw_scores=True))
    torch.testing.assert_close(raw, wanted, atol=2e-4, rtol=1e-4)
    scores = torch.tensor(world.scores(name, asked))
    torch.testing.assert_close(scores, wanted.sigmoid(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_that_are_too_long_lose_the_longer_text_first(world: World, side: Any) -> None:
    longer = tiny_bases.texts(6, seed=21, longest=90)
    asked = [(one, two) for one in longer[:3] for two in longer[3:]]
    asked += [("a fine film", " ".join(longer)), (" ".join(longer), "a fine film")]
    wanted = alone(world, "relevant", asked, side=side)
    got = world.scores("relevant", asked, raw_scores=True, side=side)
    torch.testing.assert_close(torch.tensor(got), wanted, atol=2e-4, rtol=1e-4)


def test_in_a_mixed_batch_each_pair_has_the_score_that_it_has_alone(world: World) -> None:
    asked = pairs(8, seed=31)
    engine = world.engine
    kinds: dict[str, tuple[str, Any]] = {
        "rank": ("relevant", "text-ranking"),
        "other": ("similar", "text-ranking"),
        "predicted": ("relevant", "text-classification"),
        "mood": ("mood", "text-classification"),
        "vectors": ("relevant", "feature-extraction"),
    }
    separate = {
        key: engine.encode(asked, task=task, version=world.versions[name]).outputs
        for key, (name, task) in kinds.items()
    }
    for key, (name, task) in kinds.items():
        engine.submit(
            EncodeRequest(
                key, task, name, world.versions[name], engine.text.tokenize(asked, task),
                submitted=time.monotonic(),
            )
        )  # fmt: skip
    ended: dict[str, EncodeResult] = {}
    until = time.monotonic() + 120
    while len(ended) < len(kinds):
        assert time.monotonic() < until
        for event in engine.step():
            assert isinstance(event, EncodeResult), event
            ended[event.id] = event
    assert engine.last_step is not None
    assert engine.last_step.rows > len(asked), "they ran together"
    for key in ("rank", "other"):
        assert ended[key].outputs == pytest.approx(separate[key], abs=2e-5)
    # Asked to classify, a ranking adapter gives its one label the same probability.
    for one, score in zip(ended["predicted"].outputs, ended["rank"].outputs, strict=True):
        assert [label["label"] for label in one] == ["LABEL_0"]
        assert one[0]["score"] == pytest.approx(score, abs=2e-5)
    for key in ("mood", "vectors"):
        for one, other in zip(ended[key].outputs, separate[key], strict=True):
            tiny_bases.assert_close(one, other)


def test_an_adapter_with_several_labels_does_not_rank(world: World) -> None:
    with pytest.raises(EngineFailure) as caught:
        world.scores("mood", pairs(1, seed=1))
    assert caught.value.failure.code == "task_mismatch"
    with pytest.raises(EngineFailure):
        world.engine.encode(pairs(1, seed=1), task="text-ranking")
