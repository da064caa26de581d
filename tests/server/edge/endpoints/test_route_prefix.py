"""Below a route prefix, as Ray Serve may have one, calls are let in and written down as without."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.edge.admit.audit_log import AuditLog
from server.edge.admit.body_budget import BodyBudget
from server.edge.admit.key_file import ApiKey, digest_of
from server.edge.admit.keys import Keyring
from server.edge.endpoints.middleware import RequestMiddleware, without_prefix


def service_of(log: AuditLog) -> Any:
    async def run(work: Callable[[], None], pool: str, *, owed: bool = False) -> None:
        work()

    keys = Keyring({digest_of(b"k"): ApiKey("ops", admin=True)}, open_to_all=False)
    limits = {"max_body_bytes": 99, "max_pending_body_bytes": 99, "max_upload_bytes": 99}
    return SimpleNamespace(
        settings=SimpleNamespace(**limits, client_timeout_s=9.0, access_log=False),
        keys=keys,
        bodies=BodyBudget(),
        audit_log=log,
        slow_work=SimpleNamespace(run=run),
        dispatcher=SimpleNamespace(admission=None),
        metrics=None,
        tracing=None,
        refresh=lambda: None,
    )


@pytest.mark.parametrize("prefix", ["", "/hira", "/hira/"])
def test_admin_calls_need_their_key_and_are_written_down(tmp_path: Path, prefix: str) -> None:
    log = tmp_path / "audit.jsonl"
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    middleware = RequestMiddleware(app, service_of(AuditLog(log, 1 << 20)))

    def call(key: bytes | None) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        scope = {
            "type": "http",
            "method": "DELETE",
            "root_path": prefix,
            "path": f"{prefix.rstrip('/')}/admin/adapters/a",
            "query_string": b"",
            "headers": [] if key is None else [(b"authorization", b"Bearer " + key)],
            "client": None,
        }
        asyncio.run(middleware(scope, receive, send))
        return int(sent[0]["status"])

    assert [call(one) for one in (None, b"wrong", b"k")] == [401, 403, 204]
    assert reached == ["/admin/adapters/a"]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(one["event"], one["path"]) for one in rows] == [
        ("began", "/admin/adapters/a"),
        ("ended", "/admin/adapters/a"),
    ]


@pytest.mark.parametrize(
    ("prefix", "path", "expected"),
    [("/a", "/ab/x", "/ab/x"), ("/a", "/a", "/"), ("/a", "/x", "/x"), ("/", "/x", "/x")],
)
def test_only_a_whole_prefix_is_one(prefix: str, path: str, expected: str) -> None:
    assert without_prefix({"root_path": prefix, "path": path})["path"] == expected
