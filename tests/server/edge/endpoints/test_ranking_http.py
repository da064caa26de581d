"""/rerank, /v1/rerank, /v1/score and /similarity over real HTTP, beside other adapters."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from tests.stand import tiny_bases
from tests.stand.live import Live, hira
from tests.stand.tiny_bases import Reference

pytestmark = pytest.mark.http

QUERY = "a fine film"
TEXTS = ["dull by ann", "very good film in paris", "not a film", "in paris", "very very dull"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("ranking"), "bert")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return tiny_bases.adapter(
        base.parent / "relevance", base, "text-ranking", labels=("LABEL_0",), seed=4
    )


@pytest.fixture(scope="module")
def live(base: Path, folder: Path) -> Iterator[Live]:
    mood = tiny_bases.adapter(base.parent / "mood", base, "text-classification", seed=5)
    arguments = ["--base", str(base), "--quantization=none", "--dtype=fp32"]
    arguments += ["--adapter", f"relevance={folder}", "--adapter", f"mood={mood}"]
    with hira(base.parent / "data", *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def logits(base: Path, folder: Path) -> list[float]:
    """Of each text with the query, by transformers in float64."""
    reference = Reference(base, folder, "text-ranking")
    items = tiny_bases.text_of(base).tokenize([(QUERY, one) for one in TEXTS], "text-ranking")
    return [float(reference(one.token_ids, one.type_ids).logits[0, 0]) for one in items]


def post(live: Live, path: str, body: Any) -> httpx2.Response:
    return live.client.post(path, json=body)


def ordered(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda index: -logits[index])


def sigmoid(value: float) -> float:
    return float(torch.tensor(value).sigmoid())


def test_texts_are_ordered_by_relevance_as_tei_does(live: Live, logits: list[float]) -> None:
    answer = post(live, "/rerank?adapter=relevance", {"query": QUERY, "texts": TEXTS})
    assert answer.status_code == 200, answer.text
    ranks = answer.json()
    assert [one["index"] for one in ranks] == ordered(logits)
    assert all(set(one) == {"index", "score"} for one in ranks)
    for one in ranks:
        assert one["score"] == pytest.approx(sigmoid(logits[one["index"]]), abs=2e-5)
    assert answer.headers["X-Adapter"] == "relevance"


def test_raw_scores_and_texts_come_where_they_are_asked_for(
    live: Live, logits: list[float]
) -> None:
    body = {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True}
    ranks = post(live, "/rerank", {**body, "adapter": "relevance"}).json()
    assert [one["text"] for one in ranks] == [TEXTS[index] for index in ordered(logits)]
    assert [one["score"] for one in ranks] == pytest.approx(sorted(logits, reverse=True), abs=2e-4)


@pytest.mark.parametrize("path", ["/rerank?adapter=relevance", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_in_the_shape_of_cohere_and_vllm(
    live: Live, logits: list[float], path: str
) -> None:
    documents: list[Any] = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    body = {"model": "relevance", "query": QUERY, "documents": documents, "top_n": 2}
    answer = post(live, path, body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    best = ordered(logits)[:2]
    assert [one["index"] for one in told["results"]] == best
    assert [one["document"]["text"] for one in told["results"]] == [TEXTS[i] for i in best]
    assert [one["relevance_score"] for one in told["results"]] == pytest.approx(
        [sigmoid(logits[index]) for index in best], abs=2e-5
    )
    assert told["model"] == "relevance"
    assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] > 0
    without = post(live, path, {**body, "return_documents": False, "use_activation": False}).json()
    assert "document" not in without["results"][0]
    assert without["results"][0]["relevance_score"] == pytest.approx(max(logits), abs=2e-4)


@pytest.mark.parametrize(
    "sides", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"),
              ("data_1", "data_2")]
)  # fmt: skip
def test_scores_come_in_the_order_of_the_pairs(
    live: Live, logits: list[float], sides: tuple[str, str]
) -> None:
    wanted = pytest.approx([sigmoid(one) for one in logits], abs=2e-5)
    for first in (QUERY, [QUERY], [QUERY] * len(TEXTS)):
        body = {"model": "relevance", sides[0]: first, sides[1]: TEXTS}
        answer = post(live, "/v1/score", body)
        assert answer.status_code == 200, answer.text
        assert [one["score"] for one in answer.json()["data"]] == wanted
        assert [one["index"] for one in answer.json()["data"]] == list(range(len(TEXTS)))
    del body["model"]
    unnamed = post(live, "/v1/score?adapter=relevance", body).json()
    assert unnamed["model"] == "relevance"
    assert [one["score"] for one in unnamed["data"]] == wanted


def test_a_ranking_adapter_classifies_pairs_in_a_batch(live: Live, logits: list[float]) -> None:
    body = {"inputs": [[QUERY, one] for one in TEXTS]}
    told = post(live, "/predict?adapter=relevance", body).json()
    assert [one[0]["score"] for one in told] == pytest.approx(
        [sigmoid(one) for one in logits], abs=2e-5
    )
    record = live.client.get("/admin/adapters/relevance", headers=live.admin).json()
    assert record["task"] == "text-ranking"


def test_traffic_of_several_kinds_at_once_gives_each_its_own(
    live: Live, logits: list[float]
) -> None:
    rerank = {"query": QUERY, "texts": TEXTS, "adapter": "relevance", "raw_scores": True}
    predict = {"inputs": TEXTS, "adapter": "mood"}
    alone = post(live, "/predict", predict).json()
    with ThreadPoolExecutor(8) as pool:
        asked = [("/rerank", rerank), ("/predict", predict)] * 8
        answers = list(pool.map(lambda one: post(live, *one).json(), asked))
    for ranks in answers[::2]:
        assert [one["score"] for one in ranks] == pytest.approx(
            sorted(logits, reverse=True), abs=2e-4
        )
    for labels in answers[1::2]:
        for one, other in zip(labels, alone, strict=True):
            assert [label["label"] for label in one] == [label["label"] for label in other]
            assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-4)


def test_pairs_that_are_too_long_are_refused_or_cut_where_asked(live: Live) -> None:
    long = {"query": QUERY, "texts": [" ".join(TEXTS * 9)], "adapter": "relevance"}
    refused = post(live, "/rerank", long)
    assert (refused.status_code, refused.json()["code"]) == (413, "input_too_long")
    assert refused.json()["field"] == "texts"
    scores = set()
    for direction in ("Left", "Right", "left", "right"):
        body = {**long, "truncate": True, "truncation_direction": direction}
        scores.add(post(live, "/rerank", body).json()[0]["score"])
    assert len(scores) == 2, "one for each end"


def test_similarity_is_the_cosine_of_the_vectors(live: Live) -> None:
    for adapter in ("", "?adapter=mood"):
        vectors = post(live, f"/embed{adapter}", {"inputs": [QUERY, *TEXTS]}).json()
        source, *others = torch.tensor(vectors, dtype=torch.float64)
        wanted = torch.nn.functional.cosine_similarity(source[None], torch.stack(others))
        body = {"inputs": {"source_sentence": QUERY, "sentences": TEXTS}}
        told = post(live, f"/similarity{adapter}", body)
        assert told.status_code == 200, told.text
        assert told.json() == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/rerank?adapter=mood", {"query": "a", "texts": ["b"]}, 400, "task_mismatch"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 400, "adapter_required"),
        ("/rerank?adapter=relevance", {"query": "a", "texts": []}, 422, "invalid_request"),
        ("/rerank?adapter=relevance", {"query": "a"}, 422, "invalid_request"),
        ("/rerank?adapter=relevance", {"query": "a", "texts": ["b"], "top": 1}, 422,
         "invalid_request"),
        ("/rerank?adapter=relevance", {"query": "a", "texts": ["b"], "documents": ["b"]}, 422,
         "invalid_request"),
        ("/v1/rerank", {"model": "mood", "query": "a", "documents": ["b"]}, 400, "task_mismatch"),
        ("/v1/rerank", {"model": "relevance", "query": "a", "documents": ["b"],
                        "max_tokens_per_doc": 3}, 400, "unsupported_parameter"),
        ("/v1/rerank", {"model": "relevance", "query": "a", "documents": []}, 400,
         "invalid_request"),
        ("/v1/score", {"model": "relevance", "text_1": "a"}, 400, "invalid_request"),
        ("/v1/score", {"model": "relevance", "text_1": "a", "documents": "b"}, 400,
         "invalid_request"),
        ("/v1/score", {"model": "relevance", "text_1": ["a", "b"], "text_2": ["c"] * 3}, 400,
         "invalid_request"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 422,
         "invalid_request"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]},
                         "parameters": {"prompt_name": "query"}}, 400, "unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_refused_by_name(
    live: Live, path: str, body: Any, status: int, code: str
) -> None:
    answer = post(live, path, body)
    told = answer.json()
    assert (answer.status_code, told.get("code") or told["error"]["code"]) == (status, code), told
