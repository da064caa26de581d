"""`hira cluster up` in its real processes, beside `hira serve` on the same base and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
OWN_HEADERS = {
    *("date", "server", "x-request-id", "x-queue-ms", "x-compute-ms", "content-length"),
    *("connection", "transfer-encoding"),
}
VARYING = {"id", "created", "created_at", "requests", "last_used", "residency"}


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


def adapters() -> dict[str, str]:
    """A demo adapter's name by its task."""
    found = {}
    for path in sorted(ADAPTERS_DIR.glob("*/adapter_config.json")):
        found[str(json.loads(path.read_text()).get("task_type"))] = path.parent.name
    return found


def shown(answer: httpx2.Response) -> tuple[int, dict[str, str], Any]:
    """What must be equal: status, headers and body but for times and ids."""
    headers = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
    try:
        body: Any = _without(answer.json())
    except ValueError:
        lines = answer.text.splitlines()
        body = [
            _without(json.loads(one[5:])) if one.startswith("data: {") else one for one in lines
        ]
    return answer.status_code, headers, body


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(one) for key, one in value.items() if key not in VARYING}
    return [_without(one) for one in value] if isinstance(value, list) else value


def calls() -> list[tuple[str, str, dict[str, Any]]]:
    names = [path.parent.name for path in sorted(ADAPTERS_DIR.glob("*/adapter_config.json"))]
    text = {"inputs": "A fine film of quiet people."}
    several = {"inputs": ["A fine film.", "Dull, and far too long."]}
    prompt = {"inputs": "The film", "parameters": {"max_new_tokens": 8}}
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name in names:
        found += [("POST", f"{path}?adapter={name}", text) for path in ("/predict", "/embed", "/")]
        found += [
            ("POST", f"/predict?adapter={name}", several),
            ("POST", f"/generate?adapter={name}", prompt),
            ("POST", f"/generate_stream?adapter={name}", prompt),
            ("POST", "/v1/completions", {"model": name, "prompt": "The", "temperature": 0}),
            ("POST", "/v1/chat/completions", {"model": name, **chat}),
            ("POST", "/v1/chat/completions", {"model": name, "stream": True, **chat}),
            ("POST", "/v1/embeddings", {"model": name, "input": "A fine film."}),
            ("GET", f"/v1/models/{name}", {}),
        ]
    return [
        *found,
        ("GET", "/", {}),
        ("GET", "/health/live", {}),
        ("GET", "/health/ready", {}),
        ("GET", "/v1/models", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/nowhere", {}),
        ("DELETE", "/predict", {}),
        ("POST", "/predict?adapter=nobody", text),
        ("POST", "/predict", {"inputs": 7}),
        ("POST", "/generate", {"inputs": "x", "parameters": {"max_new_tokens": -1}}),
        ("GET", "/admin/adapters", {}),
        ("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}),
    ]


def test_every_call_is_answered_as_one_machine_answers_it(both: tuple[Live, Live]) -> None:
    one, many = both
    different = []
    for method, path, body in calls():
        sent: dict[str, Any] = {"json": body} if method == "POST" else {}
        expected, found = (shown(live.client.request(method, path, **sent)) for live in (one, many))
        if found != expected:
            different.append((method, path, expected, found))
    assert different == []


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
