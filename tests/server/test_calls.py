"""What calls name and ask for: the base by its name, fields in errors, what can never fit.

In the real processes, around an engine without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.edge import prepare
from server.edge.openai import OpenAI
from server.edge.service import Base
from server.edge.supervise import StartFailed
from server.schemas_openai import CompletionRequest
from server.settings import AdapterSource, Settings
from tests.server.live import Live, fake


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("calls") / "data"
    with fake(folder, max_queue_requests=4, max_adapter_requests=3) as server:
        yield server


def post(live: Live, path: str, body: dict[str, Any]) -> httpx.Response:
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
        ("completions", {"prompt": "x" * 300}, (413, "input_too_long", "prompt")),
        ("completions", {"prompt": [[1] * 300]}, (413, "input_too_long", "prompt")),
        (
            "completions",
            {"prompt": "x", "max_tokens": 9999},
            (422, "invalid_request", "max_tokens"),
        ),
        ("completions", {"prompt": ["x"] * 4}, (413, "request_too_large", "prompt")),
        ("completions", {"prompt": "x", "n": 4}, (413, "request_too_large", "n")),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9999},
            (422, "invalid_request", "max_completion_tokens"),
        ),
        ("embeddings", {"input": "x" * 300}, (413, "input_too_long", "input")),
        ("embeddings", {"input": [1] * 300}, (413, "input_too_long", "input")),
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


@pytest.mark.parametrize("name", ["mine", "base"])
def test_no_adapter_of_the_start_has_the_bases_name(name: str) -> None:
    nothing: Any = None
    base = Base("mine", "text-generation", nothing, nothing, nothing, nothing, 0.0)
    with pytest.raises(StartFailed, match=f"adapter {name}: "):
        prepare.register(nothing, base, (AdapterSource(name, "/x"),), Settings())


@pytest.mark.parametrize("seed", [-(1 << 63) + 1, -3, -1, 0, 7, (1 << 63) - 1])
def test_copies_of_a_prompt_have_seeds_of_their_own(seed: int) -> None:
    nothing: Any = None
    body = CompletionRequest(model="m", prompt="x", seed=seed, n=16)
    calls = OpenAI(nothing)
    seeds = [
        calls._sampling(body, 1, copy, logprobs=False, scores=False).seed for copy in range(16)
    ]
    assert len(set(seeds)) == 16
    assert all(one is not None and 0 <= one < 1 << 63 for one in seeds)
