"""The audit log over HTTP: who, what, from which version to which, and what a full disk does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.demo import ADAPTERS_DIR
from server.edge.admit.key_file import digest_of, new_key
from tests.stand.live import Live, hira
from tests.stand.waits import until

pytestmark = pytest.mark.http

OPS, READER = new_key(), new_key()
SOURCES = sorted(one for one in ADAPTERS_DIR.iterdir() if one.is_dir())
SAME_TASK = [ADAPTERS_DIR / name for name in ("hira-imdb", "hira-sst2")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("audit")
    file = folder / "keys.toml"
    file.write_text(
        f'[ops]\nsha256 = "{digest_of(OPS.encode())}"\nadmin = true\n'
        f'[reader]\nsha256 = "{digest_of(READER.encode())}"\n'
    )
    arguments = [f"--source-root={ADAPTERS_DIR}", f"--keys-file={file}"]
    arguments.append(f"--audit-log={folder / 'log' / 'audit.jsonl'}")
    with hira(folder / "data", *arguments, dtype="fp32") as server:
        yield server


def log_of(live: Live) -> Path:
    return live.folder.parent / "log" / "audit.jsonl"


def rows(live: Live) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_of(live).read_text().splitlines()]


def asked(live: Live, method: str, path: str, key: str = OPS, json: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": f"id-{method}"}
    return live.client.request(method, path, headers=headers, json=json)


def test_changes_are_in_the_log_with_their_versions_and_reads_are_not(live: Live) -> None:
    one, other = ({"name": "a", "source": str(it), "replace": True} for it in SOURCES[:2])
    first = asked(live, "POST", "/admin/adapters", json=one).json()["version"]
    began, ended = rows(live)
    assert (began["event"], began["key"], began["method"]) == ("began", "ops", "POST")
    assert (began["path"], began["client"]) == ("/admin/adapters", "127.0.0.1")
    assert began["request_id"] == "id-POST"
    assert ended["status"] == 201
    assert ended["changes"] == [{"name": "a", "before": None, "after": first}]
    second = asked(live, "POST", "/admin/adapters", json=other).json()["version"]
    assert rows(live)[-1]["changes"] == [{"name": "a", "before": first, "after": second}]
    asked(live, "PATCH", "/admin/adapters/a", json={"pinned": True})
    pinned = {"name": "a", "before": second, "after": second, "pinned": True}
    assert rows(live)[-1]["changes"] == [pinned]
    asked(live, "POST", "/admin/adapters/a/rollback", json={})
    assert rows(live)[-1]["changes"] == [{"name": "a", "before": second, "after": first}]
    asked(live, "DELETE", "/admin/adapters/a")
    assert rows(live)[-1]["changes"] == [{"name": "a", "before": first, "after": None}]
    wrong = asked(live, "DELETE", "/admin/adapters/a")
    assert wrong.status_code == 404
    assert (rows(live)[-1]["status"], rows(live)[-1]["code"]) == (404, "adapter_not_found")
    before = len(rows(live))
    assert asked(live, "GET", "/admin/adapters").status_code == 200
    assert asked(live, "DELETE", "/admin/adapters/a", key=READER).status_code == 403
    assert asked(live, "DELETE", "/admin/adapters/a", key="nonsense").status_code == 403
    assert len(rows(live)) == before
    assert OPS not in log_of(live).read_text()


def test_who_points_an_alias_or_gives_a_share_is_in_the_log(live: Live) -> None:
    one, other = ({"name": "m", "source": str(it), "replace": True} for it in SAME_TASK)
    first = asked(live, "POST", "/admin/adapters", json=one).json()["version"]
    second = asked(live, "POST", "/admin/adapters", json=other).json()["version"]
    asked(live, "POST", "/admin/adapters", json={**one, "name": "n"})

    def changed(method: str, path: str, **body: Any) -> list[dict[str, Any]]:
        assert asked(live, method, path, json=body or None).is_success
        found: list[dict[str, Any]] = rows(live)[-1]["changes"]
        return found

    alias = "/admin/aliases/prod"
    moved = {"alias": "prod", "before": None, "after": "m"}
    assert changed("PUT", alias, adapter="m") == [moved]
    assert changed("PUT", alias, adapter="n") == [{**moved, "before": "m", "after": "n"}]
    applied = {"adapters": [], "remove": [], "aliases": {"prod": "m"}}
    assert changed("POST", "/admin/apply", **applied, dry_run=True) == []
    assert changed("POST", "/admin/apply", **applied) == [{**moved, "before": "n", "after": "m"}]
    assert changed("DELETE", alias) == [{**moved, "before": "m", "after": None}]
    stays = {"name": "m", "before": second, "after": second}
    shared = {**stays, "canary": {"version": first, "share": 5.0}}
    path = "/admin/adapters/m/canary"
    assert changed("PUT", path, version=first, share=5) == [shared]
    assert changed("DELETE", path) == [{**stays, "canary": None}]
    for name in ("m", "n"):
        asked(live, "DELETE", f"/admin/adapters/{name}")


def test_what_cannot_be_written_down_is_not_done_and_a_removal_says_so(live: Live) -> None:
    body = {"name": "b", "source": str(SOURCES[0])}
    assert asked(live, "POST", "/admin/adapters", json=body).status_code == 201
    kept = log_of(live).read_text()
    log_of(live).unlink()
    log_of(live).mkdir()  # stands for a disk that takes nothing
    try:
        refused = asked(live, "POST", "/admin/adapters", json={**body, "name": "c"})
        assert (refused.status_code, refused.json()["code"]) == (507, "audit_unwritable")
        assert asked(live, "GET", "/admin/adapters/c").status_code == 404
        gone = asked(live, "DELETE", "/admin/adapters/b")
        assert (gone.status_code, gone.headers["X-Audit"]) == (204, "incomplete")
        assert asked(live, "GET", "/admin/adapters/b").status_code == 404
        until(lambda: '"before": ' in live.log.read_text())
    finally:
        log_of(live).rmdir()
        log_of(live).write_text(kept)
    answer = asked(live, "POST", "/admin/adapters", json=body)
    assert answer.status_code == 201
    assert "X-Audit" not in answer.headers
    assert rows(live)[-1]["event"] == "ended"


def test_the_report_of_keys_shows_what_was_used(live: Live) -> None:
    text = {"inputs": "A fine film."}
    for _ in range(3):
        assert asked(live, "POST", "/predict?adapter=hira-imdb", key=READER, json=text).is_success
    told = asked(live, "GET", "/admin/keys?days=7").json()
    assert [one["name"] for one in told["keys"]] == ["ops", "reader"]
    reader = told["keys"][1]
    assert reader["used"]["requests_per_day"] == 3
    assert reader["prompt_tokens"] > 0
    assert reader["last_used"] is not None
    assert told["fault"] is None
    (day,) = (one for one in told["days"] if one["key"] == "reader")
    assert (day["requests"], day["prompt_tokens"]) == (3, reader["prompt_tokens"])
    metrics = asked(live, "GET", "/metrics").text
    assert 'hira_key_requests_total{key="reader",status="200"} 3.0' in metrics
    assert f'hira_key_tokens_total{{key="reader",kind="prompt"}} {day["prompt_tokens"]}' in metrics
    assert asked(live, "GET", "/admin/keys", key=READER).status_code == 403
