"""What calls name and ask for: the base by its name, fields in errors, what can never fit.

In the real processes, around an engine without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.datastructures import Headers

from server.edge.endpoints.middleware import _stated_bytes
from server.edge.endpoints.sampling_options import openai_options
from server.edge.endpoints.schemas_openai import CompletionRequest
from server.edge.endpoints.tei_tgi import check_contexts
from server.edge.link.worker_state import WorkerState, write_state
from server.edge.processes import start as prepare
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.run import banner
from server.edge.service import Service
from server.edge.target import Base
from server.errors import Refusal
from server.settings import AdapterSource, Settings, load_settings
from tests.stand.fake_server import FakeRegistry
from tests.stand.live import Live, fake


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("calls") / "data"
    with fake(folder, max_queue_requests=4, max_adapter_requests=3) as server:
        yield server


def post(live: Live, path: str, body: dict[str, Any]) -> httpx2.Response:
    return live.client.post(path, json=body)


@pytest.mark.http
@pytest.mark.parametrize("name", ["fake-base", "base"])
def test_the_bases_name_means_the_bare_base(live: Live, name: str) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
    answer = post(live, f"/generate?adapter={name}", body)
    assert answer.json() == {"generated_text": " base0"}
    assert answer.headers["X-Adapter"] == "base"
    assert post(live, f"/embed?adapter={name}", {"inputs": "hello"}).json() == [[5.0, 0.5]]
    needed = post(live, f"/predict?adapter={name}", {"inputs": "hello"})
    assert (needed.status_code, needed.json()["code"]) == (400, "adapter_required")
    two = post(live, f"/generate?adapter={name}", {**body, "adapter": "story"})
    assert (two.status_code, two.json()["code"]) == (400, "adapter_conflict")


@pytest.mark.http
@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("completions", {"prompt": "x" * 300}, (400, "context_length_exceeded", "prompt")),
        ("completions", {"prompt": [[1] * 300]}, (400, "context_length_exceeded", "prompt")),
        (
            "completions",
            {"prompt": "x", "max_tokens": 9999},
            (400, "invalid_request", "max_tokens"),
        ),
        ("completions", {"prompt": ["x"] * 4}, (413, "request_too_large", "prompt")),
        ("completions", {"prompt": "x", "n": 4}, (413, "request_too_large", "n")),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9999},
            (400, "invalid_request", "max_completion_tokens"),
        ),
        ("completions", {"prompt": "x", "top_p": 2}, (400, "invalid_request", "top_p")),
        ("completions", {"prompt": None}, (400, "invalid_request", "prompt")),
        ("embeddings", {"input": "x" * 300}, (400, "context_length_exceeded", "input")),
        ("embeddings", {"input": [1] * 300}, (400, "context_length_exceeded", "input")),
        ("embeddings?adapter=imdb", {"input": "x"}, (400, "adapter_conflict", "model")),
        ("completions?adapter=base", {"prompt": "x"}, (400, "adapter_conflict", "model")),
    ],
)
def test_openai_errors_name_the_requests_own_field(
    live: Live, path: str, body: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    answer = post(live, f"/v1/{path}", {"model": "story", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == expected


@pytest.mark.http
def test_the_same_name_in_query_and_model_is_no_conflict(live: Live) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for name, model in (("story", "story"), ("base", "fake-base")):
        answer = post(live, f"/v1/completions?adapter={name}", {"model": model, **body})
        assert answer.status_code == 200, answer.text


@pytest.mark.http
@pytest.mark.parametrize("given", ["x" * 300, [7] * 300, ["x" * 300, "y"]])
def test_openai_embeddings_are_cut_when_asked(live: Live, given: Any) -> None:
    answer = post(
        live, "/v1/embeddings", {"model": "fake-base", "input": given, "truncation": True}
    )
    assert answer.json()["data"][0]["embedding"] == [256.0, 0.5]


@pytest.mark.http
def test_wrong_types_are_refused_by_name(live: Live) -> None:
    for name, value in (("top_k", True), ("max_new_tokens", "5")):
        answer = post(live, "/generate", {"inputs": "x", "parameters": {name: value}})
        assert (answer.status_code, answer.json()["field"]) == (422, f"parameters.{name}")


@pytest.mark.http
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict?adaptor=imdb", {"inputs": "x"}),
        ("/embed?Adapter=imdb", {"inputs": "x"}),
        ("/generate?adapters=story", {"inputs": "x"}),
        ("/generate_stream?adapter=story&adapter_=story", {"inputs": "x"}),
        ("/v1/completions?adaptor=story", {"model": "fake-base", "prompt": "x"}),
        ("/v1/embeddings?adapter_=story", {"model": "fake-base", "input": "x"}),
    ],
)
def test_a_misspelt_adapter_in_the_query_is_refused(
    live: Live, path: str, body: dict[str, Any]
) -> None:
    answer = post(live, path, body)
    said = answer.json()
    found = said["error"] if path.startswith("/v1/") else said
    assert answer.status_code == (400 if path.startswith("/v1/") else 422), answer.text
    assert found["code"] == "invalid_request"
    assert "Did you mean adapter?" in found.get("fix", found.get("message"))


@pytest.mark.http
def test_what_nobody_knows_in_a_query_is_refused_but_under_v1(live: Live) -> None:
    answer = post(live, "/generate?color=red&truncate=1", {"inputs": "x"})
    assert answer.status_code == 422
    assert [one["field"] for one in answer.json()["problems"]] == ["color", "truncate"]
    body = {"model": "story", "prompt": "x", "max_tokens": 1}
    assert post(live, "/v1/completions?api-version=2024-02-01", body).status_code == 200


@pytest.mark.http
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "hello", "parameters": None, "adapter": None, "stream": None}),
        (
            "/generate",
            {
                "inputs": "hello",
                "parameters": {
                    "max_new_tokens": None,
                    "do_sample": None,
                    "stop": None,
                    "details": None,
                    "return_full_text": None,
                    "truncation": None,
                    "watermark": None,
                    "decoder_input_details": None,
                    "ignore_eos_token": None,
                },
            },
        ),
        ("/embed", {"inputs": "hello", "parameters": {"normalize": None, "truncation": None}}),
        ("/embed", {"inputs": "hello", "parameters": None}),
        ("/predict?adapter=imdb", {"inputs": "hello", "parameters": None}),
        ("/predict?adapter=imdb", {"inputs": "hello", "parameters": {"truncation": None}}),
        (
            "/v1/completions",
            {
                "model": "story",
                "prompt": "x",
                "max_tokens": None,
                "ignore_eos": None,
                "logprobs": None,
                "stream_options": {"include_usage": None},
                "suffix": None,
                "logit_bias": None,
            },
        ),
        ("/v1/embeddings", {"model": "fake-base", "input": "x", "encoding_format": None}),
    ],
)
def test_null_is_the_default(live: Live, path: str, body: dict[str, Any]) -> None:
    given = post(live, path, body)
    assert given.status_code == 200, given.text

    def kept(one: Any) -> Any:
        if not isinstance(one, dict):
            return one
        return {name: kept(value) for name, value in one.items() if value is not None}

    plain = post(live, path, kept(body)).json()
    for answer in (told := given.json(), plain):
        if isinstance(answer, dict):
            answer.pop("id", None)
            answer.pop("created", None)
    assert told == plain


@pytest.mark.http
def test_null_in_the_place_of_what_nobody_knows_is_refused(live: Live) -> None:
    answer = post(live, "/generate", {"inputs": "x", "parameters": {"temprature": None}})
    assert (answer.status_code, answer.json()["field"]) == (422, "parameters.temprature")


@pytest.mark.http
@pytest.mark.parametrize(
    ("path", "field", "code"),
    [
        ("/predict?adapter=imdb", "inputs", ("code",)),
        ("/generate", "inputs", ("code",)),
        ("/v1/completions", "prompt", ("error", "code")),
        ("/v1/embeddings", "input", ("error", "code")),
    ],
)
def test_a_body_of_very_many_values_is_refused_by_every_call(
    live: Live, path: str, field: str, code: tuple[str, ...]
) -> None:
    answer = post(live, path, {"model": "base", field: [1] * 400_000})
    found = answer.json()
    for name in code:
        found = found[name]
    assert (answer.status_code, found) == (413, "request_too_large")


@pytest.mark.http
def test_health_is_where_other_servers_have_it(live: Live) -> None:
    answer = live.client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("length", ["\u00b2", "\u00b9\u00b2", "-1", "1_0", "", "x"])
def test_a_length_that_is_no_number_is_none(length: str) -> None:
    raw = [(b"content-length", length.encode("latin-1"))]
    assert _stated_bytes(Headers(raw=raw)) == 0


def test_a_length_of_thousands_of_digits_is_merely_large() -> None:
    assert _stated_bytes(Headers({"content-length": "9" * 9000})) > 1 << 62
    assert _stated_bytes(Headers({"content-length": "120"})) == 120


@pytest.mark.parametrize(
    "inputs",
    ["who?", ["who?"], ["who?", "ann"], [("who?", "ann"), "who?"], [("who?", " ")]],
)
def test_a_question_without_a_context_is_refused(inputs: Any) -> None:
    with pytest.raises(Refusal) as caught:
        check_contexts(inputs)
    assert (caught.value.status, caught.value.faults[0].field) == (422, "inputs")
    assert "[[question, context], ...]" in str(caught.value.faults[0].expected)


def test_questions_with_contexts_are_taken() -> None:
    for inputs in (("who?", "ann"), [("who?", "ann"), ("where?", "in paris")]):
        check_contexts(inputs)


@pytest.mark.parametrize("name", ["mine", "base"])
def test_no_adapter_of_the_start_has_the_bases_name(name: str) -> None:
    nothing: Any = None
    signature: Any = SimpleNamespace(digest="")
    base = Base("mine", "text-generation", signature, nothing, nothing, nothing, 0.0)
    with pytest.raises(StartFailed, match=f"adapter {name}: "):
        prepare.register(nothing, base, (AdapterSource(name, "/x"),), Settings())


def test_the_banner_tells_what_the_worker_has_loaded(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path, "quantization": "nf4", "dtype": "bf16"})
    nothing: Any = None
    signature: Any = SimpleNamespace(digest="")
    base = Base("mine", "text-generation", signature, nothing, nothing, nothing, 0.0)
    registry: Any = FakeRegistry()
    service = Service(settings, base, registry, lambda: settings)
    settings.run_dir.mkdir()
    assert [line for line in banner(service, None) if "base " in line] == ["  base       mine"]
    loaded = {"storage": "8 bit", "dtype": "float32", "device": "cpu"}
    write_state(settings.run_dir, WorkerState(0, "1", 1, 0.0, 0.0, loaded))
    lines = list(banner(service, None))
    assert "  base       mine (8 bit, float32, cpu)" in lines
    assert "  adapters   2: imdb, story" in lines


@pytest.mark.parametrize("seed", [-(1 << 63) + 1, -3, -1, 0, 7, (1 << 63) - 1])
def test_copies_of_a_prompt_have_seeds_of_their_own(seed: int) -> None:
    body = CompletionRequest(model="m", prompt="x", seed=seed, n=16)
    seeds = [openai_options(body, 1, copy=copy).seed for copy in range(16)]
    assert len(set(seeds)) == 16
    assert all(one is not None and 0 <= one < 1 << 63 for one in seeds)
