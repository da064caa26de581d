"""Clients that were made for text-generation-inference and text-embeddings-inference, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import InferenceClient

from tests.stand import tiny_bases
from tests.stand.live import Live, hira

pytestmark = pytest.mark.http

TEXTS = ["a fine film", "dull by ann"]
LONG = " ".join(["very"] * 90)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """An encoder with a classifier, a cross-encoder and an adapter for vectors."""
    root = tmp_path_factory.mktemp("encoder")
    base = tiny_bases.base_folder(root, "bert")
    arguments = ["--base", str(base), "--quantization=none", "--dtype=fp32"]
    for name, task, labels in (
        ("mood", "text-classification", ("bad", "fine", "great")),
        ("relevance", "text-ranking", ("LABEL_0",)),
        ("vectors", "feature-extraction", ("no", "yes")),
    ):
        folder = tiny_bases.adapter(root / name, base, task, labels=labels)
        arguments += ["--adapter", f"{name}={folder}"]
    with hira(root / "data", *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("decoder")
    base = tiny_bases.base_folder(root, "llama")
    story = tiny_bases.adapter(root / "story", base, "text-generation")
    arguments = ["--base", str(base), "--quantization=none", "--dtype=fp32"]
    with hira(root / "data", *arguments, "--adapter", f"story={story}") as server:
        yield server


def post(live: Live, path: str, body: Any) -> httpx2.Response:
    return live.client.post(path, json=body)


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_hub_client_makes_vectors_as_it_asks_for_them(encoder: Live, path: str) -> None:
    client = InferenceClient(model=f"{encoder.url}{path}?adapter=vectors")
    plain: Any = client.feature_extraction(TEXTS[0], normalize=False)
    unit: Any = client.feature_extraction(TEXTS[0], normalize=True, truncate=True)
    wanted = post(
        encoder,
        "/embed?adapter=vectors",
        {"inputs": TEXTS[0], "parameters": {"normalize": False}},
    ).json()
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(wanted), atol=1e-5, rtol=1e-4)
    norm = torch.tensor(plain).norm()
    torch.testing.assert_close(torch.tensor(unit), torch.tensor(plain) / norm, atol=1e-5, rtol=1e-4)
    for side in ("left", "right"):
        many: Any = client.feature_extraction(
            f"{TEXTS[0]} {LONG}", truncate=True, truncation_direction=side
        )
        assert len(many) == 1


@pytest.mark.parametrize("path", ["/similarity", "/"])
def test_hub_client_compares_sentences(encoder: Live, path: str) -> None:
    client = InferenceClient(model=f"{encoder.url}{path}?adapter=vectors")
    told = client.sentence_similarity(TEXTS[0], other_sentences=[TEXTS[0], TEXTS[1]])
    assert told[0] == pytest.approx(1.0, abs=1e-5)
    assert told[1] < 0.9999


@pytest.mark.parametrize("path", ["/predict", "/"])
def test_hub_client_classifies(encoder: Live, path: str) -> None:
    client = InferenceClient(model=f"{encoder.url}{path}?adapter=mood")
    # It takes the first of what comes: with TEI's shape, the likeliest label.
    told: Any = client.text_classification(TEXTS[0], top_k=2)
    wanted = post(encoder, "/predict?adapter=mood", {"inputs": TEXTS[0]}).json()[0]
    assert (told.label, told.score) == (wanted["label"], pytest.approx(wanted["score"], abs=1e-5))


@pytest.mark.parametrize("path", ["/generate", "/"])
def test_hub_client_generates(decoder: Live, path: str) -> None:
    client = InferenceClient(model=f"{decoder.url}{path}?adapter=story")
    whole = client.text_generation("a fine", max_new_tokens=6, details=True)
    assert whole.details is not None
    assert whole.details.generated_tokens <= 6
    drawn = client.text_generation(
        "a fine", max_new_tokens=6, typical_p=0.95, top_p=0.95, temperature=0.8, seed=3
    )
    assert isinstance(drawn, str)
    pieces = list(client.text_generation("a fine", max_new_tokens=6, stream=True))
    assert "".join(pieces).strip() == whole.generated_text.strip()


def test_tei_writes_batches_as_lists_of_lists_and_its_fields_at_the_top(encoder: Live) -> None:
    flat = post(encoder, "/predict?adapter=mood", {"inputs": TEXTS}).json()
    nested = {"inputs": [[one] for one in TEXTS], "truncate": True, "raw_scores": False}
    assert post(encoder, "/predict?adapter=mood", nested).json() == flat
    assert len(flat) == 2, "a flat list of two texts is a batch, and no pair"
    mixed = {"inputs": [[TEXTS[0]], TEXTS, [TEXTS[1], TEXTS[0]]]}
    assert len(post(encoder, "/predict?adapter=relevance", mixed).json()) == 3
    raw = post(encoder, "/predict?adapter=mood", {"inputs": TEXTS[0], "raw_scores": True}).json()
    wanted = {"inputs": TEXTS[0], "parameters": {"function_to_apply": "none"}}
    assert raw == post(encoder, "/predict?adapter=mood", wanted).json()
    assert raw != flat[0]
    vectors = post(encoder, "/embed", {"inputs": TEXTS, "normalize": True}).json()
    assert post(encoder, "/embed", {"inputs": [[one] for one in TEXTS]}).json() == vectors
    ranked = {"query": TEXTS[0], "texts": [[one] for one in TEXTS]}
    assert len(post(encoder, "/rerank?adapter=relevance", ranked).json()) == 2


def test_inputs_that_are_too_long_are_cut_at_either_end(encoder: Live) -> None:
    long = {"inputs": f"{TEXTS[0]} {LONG} {TEXTS[1]}"}
    for path in ("/predict?adapter=mood", "/embed"):
        assert post(encoder, path, long).status_code == 413
        cut = {**long, "truncate": True}
        right = post(encoder, path, cut)
        assert right.status_code == 200, right.text
        assert post(encoder, path, {**cut, "truncation_direction": "Right"}).json() == right.json()
        left = post(encoder, path, {**cut, "truncation_direction": "Left"})
        assert left.json() != right.json()


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/embed", {"inputs": "a", "prompt_name": "query"}, "unsupported_parameter"),
        ("/embed", {"inputs": "a", "normalize": True, "parameters": {"normalize": False}},
         "invalid_request"),
        ("/predict?adapter=mood", {"inputs": "a", "raw_scores": True,
                                   "parameters": {"function_to_apply": "softmax"}},
         "invalid_request"),
        ("/predict?adapter=mood", {"inputs": [["a", "b", "c"]]}, "invalid_request"),
        ("/?adapter=nobody", {"inputs": "a"}, "adapter_not_found"),
        ("/?adapter=mood", {"text": "a"}, "invalid_request"),
        ("/?adapter=mood", {"query": "a", "texts": ["b"]}, "task_mismatch"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(
    encoder: Live, path: str, body: Any, code: str
) -> None:
    told = post(encoder, path, body).json()
    assert told["code"] == code
    assert told["error"] == told["detail"]
    assert told["error_type"] in {"validation", "adapter_not_found"}


def test_the_root_answers_as_the_call_of_the_task(encoder: Live, decoder: Live) -> None:
    asked = {"inputs": TEXTS[0]}
    for adapter, path in (("mood", "/predict"), ("vectors", "/embed")):
        root = post(encoder, f"/?adapter={adapter}", asked)
        assert root.json() == post(encoder, f"{path}?adapter={adapter}", asked).json()
        assert root.headers["X-Adapter"] == adapter
    ranked = {"query": TEXTS[0], "texts": TEXTS, "adapter": "relevance"}
    assert post(encoder, "/", ranked).json() == post(encoder, "/rerank", ranked).json()
    for body in (asked, {**asked, "adapter": "story"}):
        assert post(decoder, "/", body).json() == [post(decoder, "/generate", body).json()]
