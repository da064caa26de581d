"""The pages for people: whole from this server alone, and looked at in a browser if there is one.

The look needs Chromium, node, and the npm packages playwright-core and axe-core in the folder that
PAGES_NODE_MODULES names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.demo import ADAPTERS_DIR
from server.edge.endpoints.examples import CALLS
from server.edge.link.link import WHY_NOT
from tests.stand.folders import change_config
from tests.stand.live import ROOT, Live, hira

pytestmark = pytest.mark.http

LOOK = ROOT / "tests" / "stand" / "look_at_pages.mjs"
PAGES = ("/docs", "/console")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hira(tmp_path_factory.mktemp("pages") / "data") as server:
        yield server


@pytest.mark.parametrize("path", PAGES)
def test_a_page_names_nothing_but_this_server_and_forbids_the_rest(live: Live, path: str) -> None:
    page = live.client.get(path)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    parts = [one for one in named if one.startswith(path)]
    assert len(parts) >= 2
    assert all(one.startswith(("/", "data:")) for one in named)
    assert "<script>" not in page.text
    for part in parts:
        answer = live.client.get(part)
        assert answer.status_code == 200
        assert len(answer.content) > 100
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_console_has_words_for_every_state_of_a_server(live: Live) -> None:
    script = live.client.get("/console/app.js").text
    states = script[script.index("const STATES") :].split("};", 1)[0]
    told = re.findall(r"^  (\w+): ", states, re.MULTILINE)
    assert {*WHY_NOT, "ready", "worker_stuck"} <= set(told)


def test_what_was_elsewhere_leads_to_the_reference(live: Live) -> None:
    assert live.client.get("/redoc").headers["location"] == "/docs"
    assert live.client.get("/docs/oauth2-redirect").status_code == 404


def test_every_call_with_a_body_has_an_example_and_the_demo_answers_it(live: Live) -> None:
    document: dict[str, Any] = live.client.get("/openapi.json").json()
    bodies = {
        (path, method)
        for path, operations in document["paths"].items()
        for method, one in operations.items()
        if "requestBody" in one
    }
    assert bodies == set(CALLS)
    # Those that need what the demo does not have: a reranker, a chat template, a folder.
    elsewhere = {"/rerank", "/v2/rerank", "/v1/rerank", "/v1/score", "/v1/chat/completions"}
    elsewhere |= {"/v1/responses"}
    for path, method in sorted(bodies):
        content = document["paths"][path][method]["requestBody"]["content"]
        example = content["application/json"]["example"]
        adapter = CALLS[path, method][0]
        answer = live.client.request(
            method,
            path.replace("{name}", "hira-imdb").replace("{alias}", "production"),
            json=example,
            params={} if adapter is None else {"adapter": adapter},
            headers=live.admin if path.startswith("/admin") else {},
        )
        expected = answer.status_code in (400, 404) if path in elsewhere else answer.is_success
        if path in {"/admin/adapters", "/admin/apply"}:
            expected = answer.json()["code"] in {"source_forbidden", "adapter_not_found"}
        if path.endswith(("/rollback", "/canary")):
            expected = answer.json()["code"] == "version_not_found"
        assert expected, f"{method} {path}: {answer.text}"


def test_an_audit_has_the_rank_of_every_layer(live: Live) -> None:
    told = live.client.get("/admin/adapters/hira-imdb/audit", headers=live.admin).json()
    assert told["method"] == "hira"
    assert told["contradictions"] == 0
    assert set(told["ranks"].values()) == {16}
    assert live.client.get("/admin/adapters/hira-imdb/audit").status_code == 401
    nobody = live.client.get("/admin/adapters/nobody/audit", headers=live.admin)
    assert nobody.json()["code"] == "adapter_not_found"


def test_a_browser_sees_the_pages_and_axe_finds_nothing(live: Live, tmp_path: Path) -> None:
    modules = os.environ.get("PAGES_NODE_MODULES")
    chromium = shutil.which("chromium")
    if modules is None or chromium is None or shutil.which("node") is None:
        pytest.skip("needs chromium, node, and PAGES_NODE_MODULES with playwright-core, axe-core")
    other = change_config(
        shutil.copytree(ADAPTERS_DIR / "hira-imdb", tmp_path / "other"), base_model_name_or_path="x"
    )
    files = [("files", (one.name, one.read_bytes())) for one in other.iterdir() if one.is_file()]
    answer = live.client.post(
        "/admin/adapters",
        data={"name": "hira-imdb", "replace": "true"},
        files=files,
        headers=live.admin,
    )
    assert answer.status_code == 201, answer.text
    key = live.admin["Authorization"].removeprefix("Bearer ")
    looked = subprocess.run(
        ["node", str(LOOK), live.url, key, str(tmp_path)],
        cwd=Path(modules).parent,
        env={**os.environ, "CHROMIUM": chromium},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert looked.returncode == 0, looked.stderr
    seen = json.loads(looked.stdout)
    assert seen["foreign"] == []
    assert seen["complaints"] == []
    assert len(seen["axe"]) == 38
    assert {name: found for name, found in seen["axe"].items() if found} == {}
    assert {name: most for name, most in seen["wide"].items() if most} == {}, "scrolls sideways"
    assert "40 of 146" in seen["states"]["starting"]
    assert "draining" in seen["states"]["draining"]
    assert "worker down" in seen["states"]["worker_lost"]
    assert "worker down" in seen["states"]["worker_silent"]
    assert "stuck" in seen["states"]["worker_stuck"]
    assert "restarting: " in seen["states"]["restarting"]
    assert "no answer" in seen["states"]["away"]
    assert seen["first"] == ["hira-imdb", "hira-sst2"], "what can be compared is chosen at first"
    assert seen["rolled"] == 1
    assert seen["current"] >= 1
    assert seen["state"] == "ready"
    assert seen["unkeyed"] == 0, "without a key nothing can be changed"
    assert seen["stored"] == [0, 1, ""], "the key is in the session's storage only"
    assert len(seen["labels"]) == 4
    assert sum(bool(one.strip()) for one in seen["streamed"]) == 2
    assert seen["ranks"] > 0
    reached = ["Skip to the content", "key", "Versions of hira-imdb", "Ask all", "Audit"]
    assert seen["tabbed"] == reached
    assert seen["closed"]
    assert seen["returned"] == "Versions of hira-imdb", "the focus is back where it was"
