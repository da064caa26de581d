"""The whole server over real HTTP: the demo base in its worker, adapters made on the spot."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.demo import BASE_DIR
from tests.stand.live import Live, hira, of_one_machine
from tests.stand.made import make_adapter

pytestmark = [
    pytest.mark.http,
    pytest.mark.skipif(
        not (BASE_DIR / "config.json").exists(), reason="the embedded demo has not been trained"
    ),
]

INFERENCE_KEY = "inference-key-of-a-test"
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_adapter(root / "mood", seed=1, labels=("BAD", "GOOD"))
    make_adapter(root / "other-mood", seed=2, labels=("BAD", "GOOD"))
    make_adapter(root / "topic", seed=3, labels=("A", "B", "C"), rank=8)
    make_adapter(root / "teller", seed=4)
    make_adapter(root / "poet", seed=5, method="LORA")
    return root


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("http") / "data"
    arguments = ["--base", str(BASE_DIR), "--base-name", "demo", "--dtype", "fp32"]
    for name in ("mood", "topic", "teller", "poet"):
        arguments += ["--adapter", f"{name}={made / name}"]
    with hira(folder, *arguments, "--source-root", str(made), anew=True, slots=4) as server:
        yield server


def post(live: Live, path: str, body: Any, **more: Any) -> httpx2.Response:
    return live.client.post(path, json=body, **more)


def upload(live: Live, name: str, folder: Path, **fields: str) -> httpx2.Response:
    files = [
        ("files", (one, (folder / one).read_bytes())) for one in FILES if (folder / one).exists()
    ]
    return live.client.post(
        "/admin/adapters", data={"name": name, **fields}, files=files, headers=live.admin
    )


def test_prediction_has_the_adapters_labels_and_headers(live: Live) -> None:
    answer = post(live, "/predict?adapter=mood", {"inputs": "a fine day"})
    assert answer.status_code == 200, answer.text
    scores = answer.json()
    assert {one["label"] for one in scores} == {"BAD", "GOOD"}
    assert sum(one["score"] for one in scores) == pytest.approx(1, abs=1e-5)
    assert answer.headers["X-Adapter"] == "mood"
    record = live.client.get("/admin/adapters/mood", headers=live.admin).json()
    assert answer.headers["X-Adapter-Version"] == record["version"]
    assert float(answer.headers["X-Queue-Ms"]) >= 0
    assert float(answer.headers["X-Compute-Ms"]) > 0


def test_a_list_gets_a_list_and_top_k_cuts_it(live: Live) -> None:
    body = {"inputs": ["one", "two words", "three of them"], "parameters": {"top_k": 1}}
    answer = post(live, "/predict", {**body, "adapter": "topic"})
    assert [len(one) for one in answer.json()] == [1, 1, 1]


def test_mixed_traffic_gives_each_what_it_gets_alone(live: Live) -> None:
    asked = [(name, f"text number {at}") for at in range(12) for name in ("mood", "topic")]

    def ask(one: tuple[str, str]) -> Any:
        return post(live, f"/predict?adapter={one[0]}", {"inputs": one[1]}).json()

    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, asked))
    for before, after in zip(alone, together, strict=True):
        assert [one["label"] for one in before] == [one["label"] for one in after]
        for one, two in zip(before, after, strict=True):
            assert one["score"] == pytest.approx(two["score"], abs=1e-4)


def test_generation_and_its_stream_say_the_same(live: Live) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 12, "details": True}}
    whole = post(live, "/generate?adapter=teller", body)
    assert whole.status_code == 200, whole.text
    details = whole.json()["details"]
    assert details["generated_tokens"] == len(details["tokens"]) <= 12
    with live.client.stream("POST", "/generate_stream?adapter=teller", json=body) as stream:
        assert stream.headers["X-Adapter"] == "teller"
        events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
    assert events[-1]["generated_text"] == whole.json()["generated_text"]
    told = "".join(one["token"]["text"] for one in events if not one["token"]["special"])
    assert told == whole.json()["generated_text"]
    assert [one["index"] for one in events] == list(range(1, len(events) + 1))
    assert events[-1]["details"]["finish_reason"] == details["finish_reason"]


def test_adapters_and_base_generate_differently(live: Live) -> None:
    body = {"inputs": "The king said", "parameters": {"max_new_tokens": 16}}
    texts = {
        name: post(live, f"/generate{name}", body).json()["generated_text"]
        for name in ("", "?adapter=teller", "?adapter=poet")
    }
    assert len(set(texts.values())) == 3


def test_embeddings_of_base_and_adapter_differ_and_have_length_one(live: Live) -> None:
    (base,) = post(live, "/embed", {"inputs": "some words"}).json()
    (mood,) = post(live, "/embed?adapter=mood", {"inputs": ["some words"]}).json()
    assert len(base) == len(mood)
    assert base != mood
    assert sum(one * one for one in base) == pytest.approx(1, abs=1e-3)


def test_openai_client(live: Live) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import openai
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused-here") as client:
        models = {one.id for one in client.models.list()}
        assert {"demo", "mood", "teller"} <= models
        whole = client.completions.create(
            model="teller", prompt="Once", max_tokens=8, temperature=0, logprobs=1
        )
        assert whole.usage is not None
        assert 1 <= whole.usage.completion_tokens <= 8
        chunks = list(
            client.completions.create(
                model="teller",
                prompt="Once",
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(choice.text for one in chunks for choice in one.choices)
        assert text == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        seeded = [
            client.completions.create(model="teller", prompt="Once", max_tokens=8, seed=5, n=2)
            for _ in range(2)
        ]
        assert [one.text for one in seeded[0].choices] == [one.text for one in seeded[1].choices]
        vectors = client.embeddings.create(model="demo", input=["a", "b c"])
        assert len(vectors.data) == 2
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="nobody", prompt="x")
        assert unknown.value.code == "adapter_not_found"
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.completions.create(model="teller", prompt="x", suffix="!")
        assert unsupported.value.param == "suffix"


def test_huggingface_client(live: Live) -> None:
    from huggingface_hub import InferenceClient

    with InferenceClient(model=f"{live.url}/generate_stream?adapter=teller") as client:
        streamed = "".join(client.text_generation("Once", max_new_tokens=6, stream=True))
    with InferenceClient(model=f"{live.url}/generate?adapter=teller") as client:
        whole = client.text_generation("Once", max_new_tokens=6, details=True)
    assert whole.generated_text == streamed
    assert whole.details is not None
    assert whole.details.generated_tokens <= 6
    with InferenceClient(model=f"{live.url}/embed") as client:
        assert client.feature_extraction("a fine day").shape[0] == 1


def asking(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "x", "parameters": parameters}


LONG = {"inputs": "word " * 2000}
WORDS = {"inputs": "x"}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/predict?adapter=nobody", WORDS, (404, "adapter_not_found", "adapter")),
        (
            "/predict?adapter=mood",
            {**WORDS, "adapter": "topic"},
            (400, "adapter_conflict", "adapter"),
        ),
        ("/predict?adapter=mood&adapter=topic", WORDS, (400, "adapter_conflict", "adapter")),
        ("/predict", WORDS, (400, "adapter_required", "adapter")),
        ("/predict?adapter=teller", WORDS, (400, "task_mismatch", "adapter")),
        ("/generate?adapter=mood", WORDS, (400, "task_mismatch", "adapter")),
        ("/predict?adapter=mood", {}, (422, "invalid_request", "inputs")),
        ("/predict?adapter=mood", {"inputs": ["x"] * 300}, (422, "invalid_request", "inputs")),
        ("/predict?adapter=mood", LONG, (413, "input_too_long", "inputs")),
        ("/predict?adapter=mood", asking(top_k=0), (422, "invalid_request", "parameters.top_k")),
        (
            "/predict?adapter=mood",
            asking(aggregation_strategy="max"),
            (400, "unsupported_parameter", "parameters.aggregation_strategy"),
        ),
        ("/generate", LONG, (413, "input_too_long", "inputs")),
        ("/generate", asking(best_of=3), (422, "invalid_request", "parameters.best_of")),
        (
            "/generate",
            asking(max_new_tokens=100_000),
            (422, "invalid_request", "parameters.max_new_tokens"),
        ),
    ],
)
def test_bad_requests(live: Live, path: str, body: Any, expected: tuple[int, str, str]) -> None:
    answer = post(live, path, body)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["field"]) == expected
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status_code


def test_lone_surrogates_are_refused_wherever_they_come(live: Live) -> None:
    headers = {"Content-Type": "application/json"}
    for path, raw in (
        ("/predict?adapter=mood", rb'{"inputs": "\ud800"}'),
        ("/predict", rb'{"inputs": "x", "adapter": "\ud800"}'),
        ("/v1/completions", rb'{"model": "\ud800", "prompt": "x"}'),
        ("/generate", rb'{"inputs": "x", "parameters": {"stop": ["\ud800"]}}'),
    ):
        answer = live.client.post(path, content=raw, headers=headers)
        assert answer.status_code in {404, 422}, answer.text


def test_the_demo_answers_the_first_chat_that_anybody_sends(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = post(live, "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_upload_serves_at_once_and_is_idempotent(live: Live, made: Path) -> None:
    first = upload(live, "fresh", made / "other-mood", preload="true")
    assert first.status_code == 201, first.text
    assert first.headers["Location"] == "/admin/adapters/fresh"
    assert upload(live, "fresh", made / "other-mood").status_code == 200
    answer = post(live, "/predict?adapter=fresh", {"inputs": "a fine day"})
    assert answer.headers["X-Adapter-Version"] == first.json()["version"]
    taken = upload(live, "fresh", made / "mood")
    assert (taken.status_code, taken.json()["code"]) == (409, "adapter_exists")
    replaced = upload(live, "fresh", made / "mood", replace="true", pinned="true")
    assert replaced.status_code == 201
    assert replaced.json()["pinned"]
    again = post(live, "/predict?adapter=fresh", {"inputs": "a fine day"})
    assert again.json() == post(live, "/predict?adapter=mood", {"inputs": "a fine day"}).json()
    patched = live.client.patch("/admin/adapters/fresh", json={"pinned": False}, headers=live.admin)
    assert not patched.json()["pinned"]
    assert patched.json()["requests"] >= 2
    assert patched.json()["last_used"]
    assert live.client.delete("/admin/adapters/fresh", headers=live.admin).status_code == 204
    assert post(live, "/predict?adapter=fresh", {"inputs": "x"}).status_code == 404


def test_archives_and_sources(live: Live, made: Path) -> None:
    folder = made / "other-mood"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in FILES:
            archive.write(folder / name, f"inner/{name}")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive2:
        for name in FILES:
            archive2.add(folder / name, name)
    for name, raw in (("one.zip", packed), ("two.tar.gz", tar)):
        answer = live.client.post(
            "/admin/adapters",
            data={"name": "packed"},
            files={"files": (name, raw.getvalue())},
            headers=live.admin,
        )
        assert answer.status_code in {200, 201}, answer.text
    body = {"name": "packed", "source": str(folder)}
    assert live.client.post("/admin/adapters", json=body, headers=live.admin).status_code == 200
    for source in ("/etc", str(made / ".." / ".."), "hf://org/name@main", "relative"):
        body = {"name": "elsewhere", "source": source}
        answer = live.client.post("/admin/adapters", json=body, headers=live.admin)
        assert (answer.status_code, answer.json()["code"]) == (403, "source_forbidden")
    body = {"name": "elsewhere", "source": str(made / "missing")}
    answer = live.client.post("/admin/adapters", json=body, headers=live.admin)
    assert (answer.status_code, answer.json()["code"]) == (422, "source_unavailable")
    assert not list((live.folder / "staging").iterdir())


def test_broken_adapters_change_nothing(live: Live, made: Path, tmp_path: Path) -> None:
    before = live.client.get("/admin/adapters", headers=live.admin).json()["total"]
    config = (made / "mood" / "adapter_config.json").read_bytes()
    tensors = (made / "mood" / "adapter_model.safetensors").read_bytes()
    good = ("adapter_config.json", config)
    cases = [
        ([good, ("adapter_model.bin", b"\x80\x04.")], "unsafe_format"),
        ([good, ("adapter_model.safetensors", tensors[:999])], "corrupt_file"),
        ([("adapter_config.json", b"{"), ("adapter_model.safetensors", tensors)], "corrupt_file"),
        ([good, ("bad name!.txt", b"x")], "unsafe_format"),
    ]
    for files, code in cases:
        answer = live.client.post(
            "/admin/adapters",
            data={"name": "broken"},
            files=[("files", one) for one in files],
            headers=live.admin,
        )
        assert answer.status_code == 422, answer.text
        assert answer.json()["code"] == code
    for name in ("UPPER", "a/b", "..", "x" * 65, "base", "demo", ""):
        answer = upload(live, name, made / "mood")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_name")
    assert live.client.get("/admin/adapters", headers=live.admin).json()["total"] == before


def test_admin_needs_its_key(live: Live) -> None:
    for path in ("/admin/adapters", "/admin/adapters/mood"):
        assert live.client.get(path).status_code == 401
        wrong = live.client.get(path, headers={"Authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["code"]) == (403, "key_wrong")
    assert oct((live.folder / "admin.key").stat().st_mode & 0o777) == "0o600"
    assert live.client.delete("/admin/adapters/mood").status_code == 401
    assert post(live, "/predict?adapter=mood", {"inputs": "x"}).status_code == 200


def test_lists_page_and_filter(live: Live) -> None:
    page = live.client.get("/admin/adapters?limit=2&offset=1", headers=live.admin).json()
    assert len(page["adapters"]) == 2
    assert page["total"] >= 4
    only = live.client.get("/admin/adapters?prefix=to", headers=live.admin).json()
    assert [one["name"] for one in only["adapters"]] == ["topic"]
    assert live.client.get("/admin/adapters?limit=0", headers=live.admin).status_code == 422


def test_metrics_tell_requests_memory_and_batches(live: Live) -> None:
    sample = 'hira_requests_total{adapter="topic",endpoint="/predict",status="200"}'
    before = live.metric(sample)
    for _ in range(3):
        post(live, "/predict?adapter=topic", {"inputs": "count me"})
    assert live.metric(sample) == before + 3
    assert live.metric('hira_base_bytes{part="linear"}') > 1e6
    assert live.metric('hira_batch_rows_count{lane="encode"}') > 0
    assert live.metric('hira_step_seconds_count{lane="generate"}') > 0
    assert live.metric('hira_tokens_total{adapter="topic",kind="prompt"}') > 0
    assert 'adapter="nobody"' not in live.client.get("/metrics").text


@of_one_machine("its processes by their roles")
def test_metrics_tell_the_memory_of_each_process(live: Live) -> None:
    assert live.metric('hira_process_resident_bytes{role="worker-0"}') > 1e7
    assert live.metric('hira_process_resident_bytes{role="http-0"}') > 1e7


def test_openapi_document_has_every_call_with_its_shapes(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    assert document["info"]["title"] == "hira-server"
    for path, method in (
        ("/predict", "post"),
        ("/embed", "post"),
        ("/generate", "post"),
        ("/generate_stream", "post"),
        ("/v1/models", "get"),
        ("/v1/completions", "post"),
        ("/v1/chat/completions", "post"),
        ("/v1/embeddings", "post"),
        ("/admin/adapters", "post"),
        ("/admin/adapters/{name}", "patch"),
        ("/metrics", "get"),
        ("/health/live", "get"),
        ("/health/ready", "get"),
    ):
        call = document["paths"][path][method]
        assert call["responses"], path
        if method in {"post", "patch"}:
            assert call["requestBody"]["content"], path
    assert live.client.get("/docs").status_code == 200
    assert live.client.get("/").json()["name"] == "hira-server"


@of_one_machine("its only worker is killed, and a cluster has others")
def test_killed_worker_comes_back_with_its_adapters(live: Live) -> None:
    pinned = {"pinned": True}
    live.client.patch("/admin/adapters/topic", json=pinned, headers=live.admin)
    before = post(live, "/predict?adapter=mood", {"inputs": "a fine day"}).json()
    body = {"inputs": "Once", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}}
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(post, live, "/generate?adapter=teller", body) for _ in range(4)]
        until = time.monotonic() + 10
        while live.metric('hira_admitted{kind="requests"}') < 4 and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(live.worker_pid, signal.SIGKILL)
        killed = time.monotonic()
        assert {one.result().status_code for one in running} == {503}
        assert time.monotonic() - killed < 20
    live.wait_ready()
    after = post(live, "/predict?adapter=mood", {"inputs": "a fine day"}).json()
    assert [one["label"] for one in after] == [one["label"] for one in before]
    # A new worker may choose another exact strategy, which rounds otherwise.
    scores = [one["score"] for one in before]
    assert [one["score"] for one in after] == pytest.approx(scores, rel=1e-3, abs=1e-9)
    until = time.monotonic() + 10
    record: dict[str, Any] = {}
    while record.get("residency") != "device":
        assert time.monotonic() < until, "the pinned adapter was not brought back"
        record = live.client.get("/admin/adapters/topic", headers=live.admin).json()
        time.sleep(0.1)


def test_end_leaves_nothing(live: Live) -> None:
    assert live.end() == 0
    time.sleep(1)  # for the resource tracker of multiprocessing to see it
    assert live.left_over() == []
    assert "Traceback" not in live.log.read_text()


def test_adapters_and_keys_outlive_the_server(live: Live, made: Path) -> None:
    """Runs after the server of this module has ended, on its data."""
    assert live.child.poll() == 0
    arguments = ["--base", str(BASE_DIR), "--base-name", "demo", "--dtype", "fp32"]
    with hira(live.folder, *arguments, anew=True, api_keys=f"app={INFERENCE_KEY}") as again:
        assert post(again, "/predict?adapter=topic", {"inputs": "x"}).status_code == 401
        wrong = {"Authorization": "Bearer nearly"}
        assert (
            post(again, "/predict?adapter=topic", {"inputs": "x"}, headers=wrong).status_code == 403
        )
        right = {"Authorization": f"Bearer {INFERENCE_KEY}"}
        assert (
            post(again, "/predict?adapter=topic", {"inputs": "x"}, headers=right).status_code == 200
        )
        assert (
            post(again, "/predict?adapter=packed", {"inputs": "x"}, headers=right).status_code
            == 200
        )
        assert again.client.get("/admin/adapters", headers=again.admin).json()["total"] >= 5
        assert again.client.get("/health/ready").status_code == 200
        assert again.end(signal.SIGINT) == 0
