"""Logs as JSON: every line of every process is an object, with what is known of its call."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from server.edge.admit.callers import Caller, set_caller
from server.edge.admit.key_file import ApiKey
from server.edge.litserve.logs import log_handler
from tests.stand.live import fake, of_one_machine

TRACE = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


def told(record: logging.LogRecord) -> dict[str, object]:
    handler = log_handler("json")
    handler.filter(record)
    found: dict[str, object] = json.loads(handler.format(record))
    return found


def record(**more: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", logging.WARNING, "x.py", 1, "%d ä", (3,), None)
    vars(made).update(more)
    return made


def test_a_line_has_what_is_known_of_its_call() -> None:
    plain = told(record())
    assert plain.pop("time")
    assert plain == {
        "level": "WARNING",
        "process": "MainProcess",
        "logger": "server.x",
        "message": "3 ä",
    }
    caller = Caller("r-1", ApiKey("app"), adapter="imdb", version="v1", traceparent=TRACE)
    set_caller(caller)
    try:
        line = told(record())
        assert line["request_id"] == "r-1"
        assert (line["key"], line["adapter"], line["version"]) == ("app", "imdb", "v1")
        assert line["trace_id"] == TRACE.split("-")[1]
        assert told(record(adapter="other"))["adapter"] == "other"
    finally:
        set_caller(None)


def test_an_error_keeps_its_traceback() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        line = told(record(exc_info=(type(error), error, error.__traceback__)))
    assert "ValueError: x" in str(line["traceback"])


@of_one_machine("Ray's own processes write lines of their own form")
@pytest.mark.http
def test_all_processes_log_objects(tmp_path: Path) -> None:
    with fake(
        tmp_path / "data", anew=True, log_format="json", access_log=True, api_keys="app=k-12345678"
    ) as live:
        answer = live.client.post(
            "/predict?adapter=imdb",
            json={"inputs": "x"},
            headers={"Authorization": "Bearer k-12345678", "traceparent": TRACE},
        )
        assert answer.status_code == 200
        os.kill(live.worker_pid, signal.SIGKILL)
        live.wait_ready()
        assert live.end() == 0
        lines = [json.loads(line) for line in live.log.read_text().splitlines()]
    (call,) = (one for one in lines if one.get("path") == "/predict")
    assert call["request_id"] == answer.headers["X-Request-Id"]
    assert (call["key"], call["adapter"], call["version"]) == ("app", "imdb", "imdb-v1")
    assert (call["status"], call["method"]) == (200, "POST")
    assert call["trace_id"] == TRACE.split("-")[1]
    assert len({one["process"] for one in lines}) > 1
