"""Scoped keys over HTTP: scopes that tell nothing, quotas, and a file that changes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from server.edge.admit.key_file import digest_of, new_key
from tests.stand.live import Live, fake, http_processes

pytestmark = pytest.mark.http

KEYS = {name: new_key() for name in ("reader", "writer", "ops", "deputy", "old", "few", "thrifty")}
MORE = {
    "reader": 'adapters = ["im*"]',
    "writer": 'adapters = ["story", "base"]',
    "ops": "admin = true",
    "deputy": "admin = true",
    "old": "expires = 2020-01-01T00:00:00Z",
    "few": "requests_per_day = 20",
    "thrifty": "tokens_per_day = 400",
}
IMDB = ("/predict?adapter=imdb", {"inputs": "x"})
STORY = ("/generate?adapter=story", {"inputs": "abc", "parameters": {"max_new_tokens": 7}})
PROCESSES = http_processes(2)
SOON_S = 20.0


def text_of(keys: dict[str, str]) -> str:
    return "\n".join(
        f'[{name}]\nsha256 = "{digest_of(key.encode())}"\n{MORE.get(name, "")}\n'
        for name, key in keys.items()
    )


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(text_of(KEYS))
    return path


@pytest.fixture(scope="module")
def live(file: Path) -> Iterator[Live]:
    with fake(file.parent / "data", keys_file=file, api_processes=PROCESSES) as server:
        yield server


def post(live: Live, call: tuple[str, Any], name: str | None) -> httpx2.Response:
    path, body = call
    return live.client.post(path, json=body, headers={} if name is None else bearer(name))


def models(live: Live, name: str) -> list[str]:
    answer = live.client.get("/v1/models", headers=bearer(name))
    return [one["id"] for one in answer.json()["data"]]


def soon(found: Callable[[], bool]) -> None:
    """Several times in a row, for there are several processes."""
    until = time.monotonic() + SOON_S
    row = 0
    while row < 10:
        assert time.monotonic() < until
        row = row + 1 if found() else 0
        time.sleep(0.05)


def plain(answer: httpx2.Response) -> tuple[int, str, dict[str, str]]:
    """All that a client sees, but what differs with every request."""
    headers = {
        name: value
        for name, value in answer.headers.items()
        if name not in {"x-request-id", "date"}
    }
    return answer.status_code, answer.text, headers


def test_a_key_asks_for_what_it_is_for(live: Live) -> None:
    assert post(live, IMDB, "reader").status_code == 200
    assert post(live, STORY, "writer").status_code == 200
    assert post(live, STORY, "reader").json()["code"] == "adapter_forbidden"
    assert post(live, IMDB, "writer").json()["code"] == "adapter_forbidden"
    assert post(live, IMDB, "ops").status_code == 200
    assert post(live, IMDB, None).status_code == 401
    assert post(live, IMDB, "old").json()["code"] == "key_expired"


@pytest.mark.parametrize(
    "call",
    [
        ("/predict?adapter={}", {"inputs": "x"}),
        ("/predict", {"inputs": "x", "adapter": "{}"}),
        ("/predict?adapter={}", {"inputs": 3}),
        ("/?adapter={}", {"inputs": "x"}),
        ("/", {"inputs": "x", "adapter": "{}"}),
        ("/generate", {"inputs": "x", "adapter": "{}"}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "{}"}}),
        ("/embed?adapter={}", {"inputs": "x"}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "adapter": "{}"}),
        ("/rerank", {"query": "x", "texts": ["y"], "adapter": "{}"}),
        ("/tokenize?adapter={}", {"inputs": "x"}),
        ("/decode", {"ids": [[1]], "adapter": "{}"}),
        ("/v1/completions", {"model": "{}", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"model": "{}", "input": "x"}),
        ("/v1/rerank", {"model": "{}", "query": "x", "documents": ["y"]}),
        ("/v1/responses", {"model": "{}", "input": "x"}),
    ],
)
def test_what_is_there_and_what_is_not_get_the_same_answer(
    live: Live, call: tuple[str, Any]
) -> None:
    def asked(name: str) -> httpx2.Response:
        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {one: filled(it) for one, it in value.items()}
            return name if value == "{}" else value

        return post(live, (call[0].format(name), filled(call[1])), "reader")

    there, missing = plain(asked("story")), plain(asked("ghost"))
    assert there == missing
    assert there[0] == 403


@pytest.mark.parametrize("path", ["/v1/models/{}", "/info?adapter={}"])
def test_nor_do_the_pages_that_describe_them_tell(live: Live, path: str) -> None:
    there, missing = (
        plain(live.client.get(path.format(name), headers=bearer("reader")))
        for name in ("story", "ghost")
    )
    assert there == missing
    assert there[0] == 403


def test_names_in_scope_are_told_as_ever(live: Live) -> None:
    assert models(live, "reader") == ["imdb"]
    assert models(live, "writer") == ["fake-base", "story"]
    assert models(live, "ops") == ["fake-base", "imdb", "story"]
    missing = post(live, ("/predict?adapter=imdb-2", {"inputs": "x"}), "reader")
    assert missing.json()["code"] == "adapter_not_found"


def test_the_bare_base_is_a_name_like_others(live: Live) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
    assert post(live, ("/generate", body), "writer").status_code == 200
    for path in ("/generate", "/generate?adapter=base", "/generate?adapter=fake-base"):
        assert post(live, (path, body), "reader").json()["code"] == "adapter_forbidden"
    answer = post(live, ("/v1/completions", {"prompt": "x"}), "reader")
    assert answer.json()["error"]["code"] == "adapter_forbidden"
    assert answer.json()["error"]["type"] == "permission_error"
    assert "fake-base" not in answer.text


def test_several_admins_and_nobody_else(live: Live) -> None:
    for name, status in (("ops", 404), ("deputy", 404), ("reader", 403), ("old", 403)):
        assert live.client.get("/admin/nothing", headers=bearer(name)).status_code == status
    assert live.client.get("/metrics").status_code == 401
    assert live.client.get("/metrics", headers=bearer("reader")).status_code == 403
    assert live.client.get("/metrics", headers=bearer("deputy")).status_code == 200
    assert not (live.folder / "admin.key").exists()


def test_requests_of_a_day_end_within_the_stated_bound_over_two_processes(live: Live) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(live, IMDB, "few"), range(60)))
    good = [one for one in answers if one.status_code == 200]
    assert 20 <= len(good) <= 21
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.json()["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 86400
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-limit-requests"] == "20"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-requests" not in post(live, IMDB, "reader").headers
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEYS["few"], max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="story", prompt="x")
    assert caught.value.code == "rate_limit_exceeded"


def test_tokens_of_a_day_count_what_was_read_and_written(live: Live) -> None:
    answer = post(live, STORY, "thrifty")
    assert answer.status_code == 200
    # Its own tokens are still all counted when the answer of a call begins, at the latest.
    soon(lambda: _left(live) == 400 - 3 - 7)
    large = ("/generate?adapter=story", {"inputs": "x", "parameters": {"max_new_tokens": 250}})
    copies = {"model": "story", "prompt": "x", "max_tokens": 100, "n": 4}
    assert post(live, ("/v1/completions", copies), "thrifty").status_code == 413
    assert _left(live) == 390, "what was refused costs nothing"
    assert post(live, large, "thrifty").status_code == 200
    refused = post(live, large, "thrifty")
    assert refused.status_code == 429
    assert "tokens" in refused.json()["detail"]
    stream = {"model": "story", "prompt": "x", "max_tokens": 250, "stream": True}
    assert post(live, ("/v1/completions", stream), "thrifty").status_code == 429


def _left(live: Live) -> int:
    answer = live.client.get("/v1/models", headers=bearer("thrifty"))
    return int(answer.headers["x-ratelimit-remaining-tokens"])


def test_the_file_may_change_and_a_broken_one_changes_nothing(live: Live, file: Path) -> None:
    fresh = {**KEYS, "late": new_key()}
    KEYS["late"] = fresh["late"]
    assert post(live, IMDB, "late").status_code == 403
    file.write_text(text_of(fresh))
    soon(lambda: post(live, IMDB, "late").status_code == 200)
    file.write_text(text_of(fresh) + "[half")
    soon(lambda: "not TOML" in live.log.read_text())
    time.sleep(2)
    assert post(live, IMDB, "late").status_code == 200
    said = live.client.get("/metrics", headers=bearer("ops")).text
    assert "hira_keys_file_good 0.0" in said
    assert live.log.read_text().count("The keys were not changed") <= 2 * PROCESSES
    gone = {name: key for name, key in fresh.items() if name != "late"}
    file.write_text(text_of(gone))
    soon(lambda: post(live, IMDB, "late").status_code == 403)
    assert "hira_keys_file_good 1.0" in live.client.get("/metrics", headers=bearer("ops")).text
    file.unlink()
    soon(lambda: live.log.read_text().count("cannot be read") >= PROCESSES)
    assert post(live, IMDB, "reader").status_code == 200
    file.write_text(text_of({"ops": KEYS["ops"]}))
    soon(lambda: post(live, IMDB, "reader").status_code == 403)
    assert live.child.poll() is None
    for key in KEYS.values():
        assert key not in live.log.read_text()
