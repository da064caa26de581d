"""Logits to answers, against the pipelines of transformers on the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from server.encoding.postprocess import (
    ANSWER_TOKENS,
    answers,
    best_spans,
    classify,
    embed,
    entities,
    fill,
)
from server.failures import NotFinite
from server.inputs.text import Text
from server.messages import TokenizedInput
from tests.stand import tiny_bases

LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")
SENTENCES = ["ann in paris is very finely good", "a dull film by ann, in goodly paris", "word7"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("base"), "distilbert")


@pytest.fixture(scope="module")
def text(base: Path) -> Text:
    return Text.load(base, max_tokens=48, vocab_size=tiny_bases.VOCABULARY)


def loaded(factory: Any, base: Path, **more: Any) -> Any:
    torch.manual_seed(1)
    model = factory.from_pretrained(base, dtype=torch.float32, **more).eval()
    if hasattr(model, "classifier"):
        torch.nn.init.normal_(model.classifier.weight, std=0.6)
    return model


def logits_of(model: Any, item: TokenizedInput) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([item.token_ids])).logits[0]
    return logits


def same(got: Any, wanted: Any) -> None:
    assert len(got) == len(wanted), (got, wanted)
    for one, other in zip(got, wanted, strict=True):
        for key, value in other.items():
            if key == "score":
                assert one[key] == pytest.approx(float(value), abs=1e-5)
            else:
                assert one[key] == value, (one, other)


@pytest.mark.parametrize(
    ("problem_type", "count"),
    [
        (None, 3),
        (None, 1),
        ("single_label_classification", 4),
        ("multi_label_classification", 3),
        ("regression", 1),
        ("regression", 2),
    ],
)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_classification_equals_the_pipeline(
    base: Path, text: Text, problem_type: str | None, count: int, top_k: int | None
) -> None:
    names = tuple(f"L{index}" for index in range(count))
    model = loaded(AutoModelForSequenceClassification, base, num_labels=count,
                   id2label=dict(enumerate(names)), problem_type=problem_type)  # fmt: skip
    reference = pipeline("text-classification", model=model, tokenizer=text.tokenizer)
    for sentence in SENTENCES:
        (item,) = text.tokenize([sentence], "text-classification")
        got = classify(logits_of(model, item), names, problem_type, top_k=top_k)
        same(got, reference([sentence], top_k=top_k)[0])


@pytest.mark.parametrize("apply", ["none", "sigmoid", "softmax"])
def test_a_client_can_choose_how_logits_become_scores(apply: Any) -> None:
    logits = torch.tensor([1.0, -2.0])
    wanted = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(0)}[apply]
    got = classify(logits, ("a", "b"), "regression", apply=apply)
    assert [one["score"] for one in got] == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("ignored", [["O"], [], ["X"]])
def test_entities_equal_the_pipeline(
    base: Path, text: Text, strategy: str, ignored: list[str]
) -> None:
    model = loaded(AutoModelForTokenClassification, base, num_labels=len(LABELS),
                   id2label=dict(enumerate(LABELS)))  # fmt: skip
    reference = pipeline("token-classification", model=model, tokenizer=text.tokenizer,
                         aggregation_strategy=strategy, ignore_labels=ignored)  # fmt: skip
    found = 0
    for sentence in SENTENCES:
        (item,) = text.tokenize([sentence], "token-classification")
        got = entities(
            logits_of(model, item), item, LABELS, text, strategy=strategy, ignored=ignored
        )
        same(got, reference(sentence))
        found += len(got)
    assert found


@pytest.mark.parametrize("sentence", ["a [MASK] film", "a [MASK] film by [MASK]"])
def test_filled_masks_equal_the_pipeline(base: Path, text: Text, sentence: str) -> None:
    model = loaded(AutoModelForMaskedLM, base)
    reference = pipeline("fill-mask", model=model, tokenizer=text.tokenizer)(sentence, top_k=4)
    (item,) = text.tokenize([sentence], "fill-mask")
    places = [i for i, token in enumerate(item.token_ids) if token == text.mask_id]
    got = fill(logits_of(model, item)[places], item, text, top_k=4)
    if len(places) == 1:
        same(got, reference)
        return
    for one, other in zip(got, reference, strict=True):
        same(one, other)


def test_an_answer_is_the_best_short_span_of_the_context(text: Text) -> None:
    item = text.tokenize([("in paris", "a very good film by ann in paris")], "question-answering")[
        0
    ]
    assert item.offsets is not None
    assert item.text is not None
    torch.manual_seed(0)
    logits = torch.randn(len(item.token_ids), 2) * 3
    inside = [i for i, (start, end) in enumerate(item.offsets) if end > start]
    chances = logits[inside].softmax(0)
    best = max(
        (float(chances[i, 0] * chances[j, 1]), i, j)
        for i in range(len(inside))
        for j in range(i, min(i + ANSWER_TOKENS, len(inside)))
    )
    (got,) = answers(logits, item)
    start, end = item.offsets[inside[best[1]]][0], item.offsets[inside[best[2]]][1]
    assert (got["start"], got["end"], got["answer"]) == (start, end, item.text[start:end])
    assert got["score"] == pytest.approx(best[0])
    assert len(answers(logits, item, top_k=3)) == 3


def spans_of_all_pairs(logits: torch.Tensor, count: int) -> list[tuple[float, int, int]]:
    """The slow reference: every pair of tokens, those that are no answer struck out."""
    starts, ends = logits.float().softmax(0).unbind(-1)
    scores = torch.outer(starts, ends).triu().tril(ANSWER_TOKENS - 1)
    values, places = scores.flatten().sort(descending=True, stable=True)
    pairs = zip(values[:count].tolist(), places[:count].tolist(), strict=True)
    return [(score, *divmod(place, len(logits))) for score, place in pairs if score > 0.0]


@pytest.mark.parametrize("tokens", [1, 2, ANSWER_TOKENS - 1, ANSWER_TOKENS, 70, 201])
@pytest.mark.parametrize("count", [1, 3, 10_000])
@pytest.mark.parametrize("spread", [0.0, 3.0, 200.0])  # ties; usual; scores that underflow
def test_spans_are_those_of_all_pairs(tokens: int, count: int, spread: float) -> None:
    logits = torch.randn(tokens, 2) * spread
    assert best_spans(logits, count) == spans_of_all_pairs(logits, count)


def test_spans_of_a_long_row_take_memory_by_its_tokens() -> None:
    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        numbers = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                if isinstance(one, torch.Tensor):
                    self.numbers = max(self.numbers, one.numel())
            return out

    tokens = 1024
    with Largest() as largest:  # type: ignore[no-untyped-call]
        best_spans(torch.randn(tokens, 2), 1)
    assert 0 < largest.numbers <= ANSWER_TOKENS * tokens


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_embedding_pools_what_it_says(pooling: Any) -> None:
    hidden = torch.randn(5, 8)
    wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[4]}[pooling]
    assert embed(hidden, pooling=pooling, normalize=False) == pytest.approx(wanted.tolist())
    unit = torch.tensor(embed(hidden, pooling=pooling))
    assert float(unit.norm()) == pytest.approx(1.0)
    assert float(unit @ wanted) == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_what_is_not_finite_is_never_an_answer(text: Text) -> None:
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(NotFinite):
        classify(bad, ("a", "b"), None)
    with pytest.raises(NotFinite):
        embed(torch.full((2, 2), float("inf")), pooling="mean")
