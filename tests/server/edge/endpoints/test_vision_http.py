"""Images over HTTP: uploaded, in base64, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand import tiny_bases
from tests.stand.live import Live, hira
from tests.stand.pictures import LABELS, TASK, bomb, expected, logits_of, pictures
from tests.stand.tiny_bases import Reference, assert_close, image, image_file
from tests.stand.uploads import upload

pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("vision"), "vit")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return tiny_bases.adapter(base.parent / "pets", base, TASK, labels=LABELS["pets"])


@pytest.fixture(scope="module")
def live(base: Path, folder: Path) -> Iterator[Live]:
    arguments = ("--base", str(base), "--quantization", "none", "--dtype", "fp32")
    with hira(base.parent / "data", *arguments, max_image_pixels=100_000) as server:
        made = upload(server, "pets", folder)
        assert made.status_code == 201, made.text
        assert made.json()["task"] == TASK
        assert "vit.embeddings.patch_embeddings.projection" in " ".join(made.json()["targets"]) or (
            "projection" in made.json()["targets"]
        )
        yield server


def refused(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code
    return problem


def test_uploads_and_base64_are_answered_as_float64_says(
    live: Live, base: Path, folder: Path
) -> None:
    reference = Reference(base, folder, TASK)
    wanted = [expected("pets", logits_of(reference, picture)) for picture in pictures()]
    files = [image_file(picture) for picture in pictures()]
    uploads = [("inputs", (f"{i}.png", raw, "image/png")) for i, raw in enumerate(files)]
    answer = live.client.post("/predict?adapter=pets", files=uploads)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Adapter"] == "pets"
    for row, truth in zip(answer.json(), wanted, strict=True):
        assert_close(row, truth)
    texts = [base64.b64encode(raw).decode() for raw in files]
    texts[0] = f"data:image/png;base64,{texts[0]}"
    body = {"inputs": texts, "adapter": "pets"}
    assert live.client.post("/predict", json=body).json() == answer.json()
    one = live.client.post("/predict?adapter=pets", json={"inputs": texts[1]})
    assert_close(one.json(), wanted[1])


def test_a_form_carries_the_adapter_and_the_parameters(live: Live) -> None:
    form = {"adapter": "pets", "parameters": json.dumps({"top_k": 1, "function_to_apply": "none"})}
    sent = {"inputs": ("cat.png", image_file(pictures()[1]))}
    answer = live.client.post("/predict", data=form, files=sent)
    assert answer.status_code == 200, answer.text
    (best,) = answer.json()
    assert best["label"] in LABELS["pets"]
    plain = live.client.post("/predict?adapter=pets", files=sent).json()
    assert best["label"] == plain[0]["label"]
    assert best["score"] != pytest.approx(plain[0]["score"])


def test_vectors_of_images(live: Live) -> None:
    sent = {"inputs": ("cat.png", image_file(pictures()[1]))}
    (plain,) = live.client.post("/embed", files=sent).json()
    (adapted,) = live.client.post("/embed?adapter=pets", files=sent).json()
    assert len(plain) == len(adapted) == 64
    assert plain != pytest.approx(adapted, abs=1e-3)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"plainly not an image", 422, "invalid_request"),
        (image_file(image(16, 16))[:90], 422, "invalid_request"),
        (image_file(image(600, 400)), 413, "input_too_long"),
        (bomb(), 413, "input_too_long"),
    ],
)
def test_files_that_are_no_usable_images(live: Live, sent: bytes, status: int, code: str) -> None:
    answer = live.client.post("/predict?adapter=pets", files={"inputs": ("cat.png", sent)})
    problem = refused(answer, status, code)
    assert problem["field"] == "inputs"
    assert problem["found"]
    assert problem["expected"]


@pytest.mark.parametrize("inputs", ["A wonderful film.", ["one", "two"], [["a", "pair"]]])
def test_texts_on_a_base_of_images(live: Live, inputs: Any) -> None:
    answer = live.client.post("/predict?adapter=pets", json={"inputs": inputs})
    assert "not an image" in refused(answer, 422, "invalid_request")["detail"]


def test_calls_for_texts_are_refused(live: Live) -> None:
    generate = {"inputs": "Once", "parameters": {"max_new_tokens": 4}}
    refused(live.client.post("/generate?adapter=pets", json=generate), 400, "task_mismatch")
    answer = live.client.post("/v1/embeddings", json={"model": "pets", "input": [[1, 2, 3]]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "task_mismatch"
    answer = live.client.post("/v1/completions", json={"model": "pets", "prompt": "Once"})
    assert answer.json()["error"]["code"] == "task_mismatch"


@pytest.mark.parametrize(
    ("fields", "files", "where"),
    [
        ({}, {"other": ("a.png", b"x")}, "other"),
        ({"nobody": "x"}, {"inputs": ("a.png", b"x")}, "nobody"),
        ({"parameters": "{"}, {"inputs": ("a.png", b"x")}, "parameters"),
        ({"parameters": '{"top_k": 0}'}, {"inputs": ("a.png", b"x")}, "parameters.top_k"),
        ({"adapter": "pets"}, {}, "inputs"),
    ],
)
def test_a_form_that_is_wrong_names_its_field(
    live: Live, fields: dict[str, str], files: dict[str, Any], where: str
) -> None:
    multipart = [(name, (None, value)) for name, value in fields.items()] + list(files.items())
    answer = live.client.post("/predict?adapter=pets", files=multipart)
    assert refused(answer, 422, "invalid_request")["field"] == where


def test_a_form_that_is_broken_off(live: Live) -> None:
    answer = live.client.post(
        "/predict?adapter=pets",
        content=b"--x\r\nContent-Disposition: form-data",
        headers={"Content-Type": "multipart/form-data"},
    )
    refused(answer, 422, "malformed_body")


def test_an_upload_beyond_the_limit_of_a_body(live: Live) -> None:
    sent = {"inputs": ("cat.png", b"x" * (9 << 20))}
    refused(live.client.post("/predict?adapter=pets", files=sent), 413, "body_too_large")


def test_the_document_knows_both_kinds_of_body(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    for path in ("/predict", "/embed"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
        assert "$ref" not in json.dumps(content)
    parameters = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    told, null = parameters["application/json"]["schema"]["properties"]["parameters"]["anyOf"]
    known = told["properties"]
    assert null == {"type": "null"}
    assert {"top_k", "targets"} <= set(known)


def test_images_on_a_base_of_texts(tmp_path: Path) -> None:
    text_base = tiny_bases.base_folder(tmp_path, "bert")
    made = tiny_bases.adapter(tmp_path / "mood", text_base, "text-classification")
    raw = image_file(pictures()[1])
    with hira(tmp_path / "data", "--base", str(text_base), "--quantization", "none") as server:
        assert upload(server, "mood", made).status_code == 201
        answers = [
            server.client.post("/predict?adapter=mood", files={"inputs": ("cat.png", raw)}),
            server.client.post(
                "/predict?adapter=mood", json={"inputs": base64.b64encode(raw).decode()}
            ),
            server.client.post("/embed", files={"inputs": ("cat.png", raw)}),
        ]
        for answer in answers:
            assert "not images" in refused(answer, 422, "invalid_input")["detail"]
        targets = server.client.post(
            "/predict",
            json={"inputs": "a [MASK] film [MASK]", "parameters": {"targets": ["fine", "##ly", 9]}},
        )
        assert targets.status_code == 200, targets.text
        first, second = targets.json()
        assert {entry["token"] for entry in first} == {entry["token"] for entry in second}
        assert {entry["token_str"] for entry in first} == {"fine", "##ly", "by"}
        whole = server.client.post(
            "/predict", json={"inputs": "a [MASK] film [MASK]", "parameters": {"top_k": 96}}
        ).json()
        scores = [{entry["token"]: entry["score"] for entry in part} for part in whole]
        for part, known in zip((first, second), scores, strict=True):
            assert sum(known.values()) == pytest.approx(1.0, abs=1e-4)
            assert all(known[entry["token"]] == entry["score"] for entry in part)
        greedy = {"inputs": ["[MASK] " * 30] * 24, "parameters": {"top_k": 1 << 20}}
        refused(server.client.post("/predict", json=greedy), 413, "request_too_large")
        wrong = server.client.post(
            "/predict",
            json={"inputs": "a [MASK]", "parameters": {"targets": ["fine", "no such word"]}},
        )
        assert refused(wrong, 422, "invalid_request")["field"] == "parameters.targets"
        wrong = server.client.post(
            "/predict?adapter=mood", json={"inputs": "a", "parameters": {"targets": ["fine"]}}
        )
        refused(wrong, 400, "unsupported_parameter")
