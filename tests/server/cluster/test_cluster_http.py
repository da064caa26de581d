"""`hira cluster up` in its real processes, beside `hira serve` on the same base and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.demo import ADAPTERS_DIR
from tests.stand.live import Live, hira, running

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

pytestmark = [pytest.mark.http, pytest.mark.timeout(1800)]

START_S = 900.0  # Ray, the controller, the proxy and every replica load their libraries anew
# Elsewhere strategies are chosen by their times, which differ in the last bits.
PAGES = "https://app.example:8443"  # the origin whose pages may call
SETTINGS: dict[str, Any] = {
    "dtype": "fp32",
    "threads": 1,
    "drain_s": 10,
    "deterministic": True,
    "cors_origins": PAGES,
}
# Of a connection: a proxy may pass a body on in other pieces than it got it in, and the HTTP server
# that Ray Serve starts names itself.
OF_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "server"}
# What may differ in the bytes of an answer, and how it is written. Everything else may not.
VARYING = (
    (rb'"(cmpl|chatcmpl|score|rerank)-[0-9a-f]{32}"', rb'"\1-ID"'),
    (rb'"(resp|msg|rs|fc)_[0-9a-f]{32}"', rb'"\1_ID"'),
    (rb'"(created|created_at|completed_at)": ?[0-9.]+', rb'"\1":TIME'),
    (rb'"(created|last_used)":(?:"[0-9T:.+-]+"|null)', rb'"\1":TIME'),
    (rb'"residency":"[a-z]+"', rb'"residency":WHERE'),
)
TIMES = ("date", "x-queue-ms", "x-compute-ms")


@contextmanager
def cluster(folder: Path, **more: Any) -> Iterator[Live]:
    command = ["-c", "from server.cli.main import main; main()", "cluster", "up", "--replicas", "2"]
    with running(folder, command, wait=False, **SETTINGS, **more) as live:
        live.wait_ready(START_S)
        yield live


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Live]]:
    folder = tmp_path_factory.mktemp("cluster")
    with (
        hira(folder / "one", wait=False, anew=True, source_root=ADAPTERS_DIR, **SETTINGS) as one,
        cluster(folder / "many", source_root=ADAPTERS_DIR) as many,
    ):
        one.wait_ready(START_S)
        yield one, many


def shown(answer: httpx2.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """What must be equal: status, headers and the bytes of the body, but for times and ids."""
    names = [name for name, _ in answer.headers.multi_items()]
    assert "content-length" in names or answer.headers["transfer-encoding"] == "chunked"
    headers = sorted(
        (name, "TIME" if name in TIMES else value)
        for name, value in answer.headers.multi_items()
        if name not in OF_CONNECTION
    )
    body = answer.content
    for varying, written in VARYING:
        body = re.sub(varying, written, body)
    return answer.status_code, headers, body


@dataclass(frozen=True)
class Asked:
    """One call; a body that is no bytes is sent as JSON."""

    method: str
    path: str
    body: Any = None
    admin: bool = False

    def sent(self, live: Live, number: int) -> httpx2.Response:
        headers = {"X-Request-Id": f"call-{number}", **(live.admin if self.admin else {})}
        body: dict[str, Any] = {"json": self.body}
        if self.body is None:
            body = {}
        elif isinstance(self.body, bytes):
            body = {"content": self.body}
            headers["Content-Type"] = "application/json"
        return live.client.request(self.method, self.path, headers=headers, **body)


def calls() -> list[Asked]:
    names = [path.parent.name for path in sorted(ADAPTERS_DIR.glob("*/adapter_config.json"))]
    text = {"inputs": "A fine film of quiet people."}
    several = {"inputs": ["A fine film.", "Dull, and far too long."]}
    prompt = {"inputs": "The film", "parameters": {"max_new_tokens": 8}}
    drawn = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "seed": 5}
    sampled = {"inputs": "The film", "parameters": {**drawn, "details": True}}
    greedy = {"max_tokens": 6, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "Hello"}], **greedy}
    answer = {"input": "Hello", "max_output_tokens": 6, "temperature": 0}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    found: list[Asked] = []
    for name in names:
        for path in ("/predict", "/embed", "/"):
            found.append(Asked("POST", f"{path}?adapter={name}", text))
        model = {"model": name, "prompt": "The", **greedy}
        found += [
            Asked("POST", f"/predict?adapter={name}", several),
            Asked("POST", f"/generate?adapter={name}", prompt),
            Asked("POST", f"/generate?adapter={name}", sampled),
            Asked("POST", f"/generate_stream?adapter={name}", prompt),
            Asked("POST", f"/generate_stream?adapter={name}", sampled),
            Asked("POST", "/v1/completions", {**model, "logprobs": 2}),
            Asked("POST", "/v1/completions", {**model, **usage}),
            Asked("POST", "/v1/chat/completions", {"model": name, **chat}),
            Asked("POST", "/v1/chat/completions", {"model": name, **chat, **usage}),
            Asked("POST", "/v1/responses", {**answer, "model": name}),
            Asked("POST", "/v1/responses", {**answer, "model": name, "stream": True}),
            Asked("POST", "/v1/embeddings", {"model": name, "input": "A fine film."}),
            Asked("GET", f"/v1/models/{name}"),
            Asked("GET", f"/admin/adapters/{name}", admin=True),
        ]
    return [
        *found,
        *(Asked("GET", path) for path in ("/", "/health/live", "/health/ready", "/v1/models")),
        *(Asked("GET", path) for path in ("/openapi.json", "/docs", "/info", "/nowhere")),
        Asked("HEAD", "/health/live"),
        Asked("DELETE", "/predict"),
        Asked("POST", "/tokenize", text),
        Asked("POST", "/predict?adapter=nobody", text),
        Asked("POST", "/predict", {"inputs": 7}),
        Asked("POST", "/predict", b'{"inputs": "a"'),
        Asked("POST", "/predict", b"\xff"),
        Asked("POST", "/generate", {"inputs": "x", "parameters": {"max_new_tokens": -1}}),
        Asked("POST", "/generate", {"inputs": "word " * 5000}),
        Asked("POST", "/generate_stream?adapter=nobody", prompt),
        Asked("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}),
        Asked("POST", "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": "many"}),
        Asked("POST", "/v1/chat/completions", b"["),
        Asked("GET", "/v1/nowhere"),
        Asked("GET", "/admin/adapters"),
        Asked("GET", "/admin/adapters", admin=True),
        Asked("GET", "/admin/adapters/nobody", admin=True),
    ]


def test_every_call_is_answered_byte_by_byte_as_one_machine_answers_it(
    both: tuple[Live, Live],
) -> None:
    different = []
    for number, asked in enumerate(calls()):
        expected, found = (shown(asked.sent(live, number)) for live in both)
        if found != expected:
            headers = set(expected[1]) ^ set(found[1])
            different.append((asked, expected[0], found[0], headers, expected[2], found[2]))
    assert different == [], different[:3]


def test_a_request_id_that_is_none_is_replaced(both: tuple[Live, Live]) -> None:
    for live in both:
        for given in ("no good", "x" * 129, ""):
            answer = live.client.get("/nowhere", headers={"X-Request-Id": given})
            (said,) = answer.headers.get_list("x-request-id")
            assert re.fullmatch(r"[0-9a-f]{32}", said)


def test_every_response_has_one_request_id_and_keeps_the_clients(both: tuple[Live, Live]) -> None:
    for live in both:
        for given in (None, "mine-1"):
            headers = {} if given is None else {"X-Request-Id": given}
            answer = live.client.get("/v1/models", headers=headers)
            (said,) = answer.headers.get_list("x-request-id")
            assert given in {None, said}


def test_pages_of_an_origin_that_is_named_may_call_and_no_others(both: tuple[Live, Live]) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    body = {"prompt": "The", "max_tokens": 2, "temperature": 0}
    found = []
    for live in both:
        of_live = []
        for origin in (PAGES, "https://elsewhere.example"):
            headers = {"Origin": origin}
            answers = [
                live.client.options("/v1/completions", headers={**headers, **asked}),
                live.client.get("/v1/models", headers=headers),
                live.client.post("/v1/completions", json=body, headers=headers),
                live.client.post("/v1/completions", json={**body, "stream": True}, headers=headers),
                live.client.post("/predict", json={"inputs": 7}, headers=headers),
                live.client.get("/nowhere", headers=headers),
            ]
            told = [
                (
                    one.status_code,
                    {
                        name: value
                        for name, value in one.headers.items()
                        if name.startswith("access-control") or name == "vary"
                    },
                )
                for one in answers
            ]
            named = [one.get("access-control-allow-origin") for _, one in told]
            assert named == ([PAGES] * len(told) if origin == PAGES else [None] * len(told))
            of_live.append(told)
        found.append(of_live)
    assert found[0] == found[1]
    assert "X-Adapter" in found[1][0][2][1]["access-control-expose-headers"]


def test_administration_registers_replaces_and_removes(both: tuple[Live, Live]) -> None:
    sources = [str(path.parent) for path in sorted(ADAPTERS_DIR.glob("*/adapter_config.json"))][:2]
    for live in both:
        client, admin = live.client, live.admin
        body = {"name": "new", "source": sources[0]}
        made = client.post("/admin/adapters", json=body, headers=admin)
        assert made.status_code == 201, made.text
        assert client.post("/admin/adapters", json=body, headers=admin).status_code == 200
        body["source"] = sources[1]
        assert client.post("/admin/adapters", json=body, headers=admin).status_code == 409
        moved = client.post("/admin/adapters", json={**body, "replace": True}, headers=admin)
        assert moved.status_code == 201
        assert moved.json()["version"] != made.json()["version"]
        shown_now = client.get("/admin/adapters/new", headers=admin).json()
        assert shown_now["version"] == moved.json()["version"]
        assert client.delete("/admin/adapters/new", headers=admin).status_code == 204
        assert client.get("/admin/adapters/new", headers=admin).status_code == 404


def test_metrics_tell_of_each_replica_and_of_routing(both: tuple[Live, Live]) -> None:
    many = both[1]
    text = many.client.get("/metrics").text
    assert text.count("hira_replica_queue_depth{") >= 2
    assert "hira_routed_total{" in text
    assert "hira_batch_rows_count" in text
