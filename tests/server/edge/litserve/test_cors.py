"""Pages of other origins may call the server where the operator says so, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import SettingsFault, load_settings
from tests.stand.live import fake

HOME = "https://app.example:8443"
ASKED = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://a.example/x", "https://", "null"]
)
def test_what_is_no_origin_stops_the_start(origin: str) -> None:
    with pytest.raises(SettingsFault, match="no origin"):
        load_settings({"cors_origins": [origin]})


@pytest.mark.http
def test_answers_errors_and_streams_name_an_allowed_origin(tmp_path: Path) -> None:
    keys = "reader=secret-key"
    with fake(tmp_path / "data", cors_origins=HOME, api_keys=keys) as live:
        call = live.client
        before = call.options("/v1/completions", headers={"Origin": HOME, **ASKED})
        assert before.status_code == 200
        assert before.headers["Access-Control-Allow-Origin"] == HOME
        assert "x-stainless-os" in before.headers["Access-Control-Allow-Headers"]
        key = {"Authorization": "Bearer secret-key"}
        body = {"model": "story", "prompt": "x", "max_tokens": 2}
        found = []
        for headers, sent in ((key, body), (key, {**body, "stream": True}), ({}, body)):
            answer = call.post("/v1/completions", json=sent, headers={"Origin": HOME, **headers})
            assert answer.headers["Access-Control-Allow-Origin"] == HOME
            readable = answer.headers["Access-Control-Expose-Headers"]
            assert "X-Adapter" in readable
            assert "X-Ignored-Fields" in readable
            assert "X-Request-Id" in answer.headers
            found.append(answer.status_code)
        assert found == [200, 200, 401]
        long = call.post("/v1/completions", content=b"x" * (9 << 20), headers={"Origin": HOME})
        assert long.headers["Access-Control-Allow-Origin"] == HOME
        other = {"Origin": "https://elsewhere.example"}
        assert call.options("/v1/completions", headers={**other, **ASKED}).status_code == 400
        answer = call.post("/v1/completions", json=body, headers={**other, **key})
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.http
def test_without_the_setting_no_origin_is_named(tmp_path: Path) -> None:
    with fake(tmp_path / "data") as live:
        assert (
            live.client.options("/v1/models", headers={"Origin": HOME, **ASKED}).status_code == 405
        )
        answer = live.client.get("/v1/models", headers={"Origin": HOME})
        assert not [one for one in answer.headers if one.startswith("access-control")]
    with fake(tmp_path / "more", cors_origins="*") as live:
        answer = live.client.get("/v1/models", headers={"Origin": HOME})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
