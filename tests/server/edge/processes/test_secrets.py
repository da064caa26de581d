"""No key and no input ever reaches a log, whatever goes wrong and however much is logged."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import httpx2
import pytest

from tests.stand.live import fake

pytestmark = pytest.mark.http

ADMIN, APP, WRONG, INPUT = "admin-0d1e2f3a", "app-4b5c6d7e", "wrong-8f9a0b1c", "private-2d3e4f5a"


def test_no_key_and_no_input_is_logged(tmp_path: Path) -> None:
    with fake(
        tmp_path / "data",
        anew=True,
        log_level="debug",
        access_log=True,
        admin_key=ADMIN,
        api_keys=f"app={APP}",
        quarantine_failures=2,
    ) as live:
        path = "/predict?adapter=imdb"
        for key in (APP, ADMIN, WRONG):
            headers = {"Authorization": f"Bearer {key}"}
            for top_k in (1, 500, 501, 10**9):
                body = {"inputs": INPUT, "parameters": {"top_k": top_k}}
                live.client.post(path, json=body, headers=headers)
                live.wait_ready()
            live.client.post(path, content=INPUT * 3, headers=headers)
            live.client.post("/v1/completions", json={"model": INPUT}, headers=headers)
            live.client.get("/admin/adapters", headers=headers)
            live.client.get("/metrics", headers=headers)
        live.client.post(path, headers={"Authorization": APP})
        place = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
        with socket.create_connection(place) as one:  # not HTTP, with a key in it
            one.sendall(f"Authorization: Bearer {APP}\r\n\r\n".encode())
            one.recv(4096)
        body = {"inputs": INPUT, "parameters": {"max_new_tokens": 200}}
        with pytest.raises(httpx2.ReadTimeout):
            live.client.post(
                "/generate?adapter=story",
                json=body,
                headers={"Authorization": f"Bearer {APP}"},
                timeout=0.3,
            )
        live.child.send_signal(signal.SIGHUP)
        live.kill_engine()
        live.wait_ready()
        assert live.end() == 0
        log = live.log.read_text(errors="replace")
        assert "POST /predict" in log  # something was logged at all
        for secret in (ADMIN, APP, WRONG, INPUT):
            assert secret not in log
        told = json.dumps([one.read_text() for one in (tmp_path / "data").rglob("*.json")])
        for secret in (ADMIN, APP, INPUT):
            assert secret not in told
