"""Traces: spans in memory, and once over a collector that the test makes; nothing without both."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server.edge.admit.callers import Caller
from server.edge.admit.key_file import ApiKey
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.preflight import check_before_loading
from server.edge.tracing import Tracing, traceparent_of
from server.messages import (
    EncodeRequest,
    EncodeResult,
    Failure,
    GeneratedToken,
    GenerateRequest,
    GenerateResult,
)
from server.settings import load_settings
from tests.stand.live import ROOT, environment, fake, free_port

TRACE = "0123456789abcdef0123456789abcdef"
PARENT = f"00-{TRACE}-0123456789abcdef-01"
# find_spec of a module of a package that is not there is an error.
HAS_SDK = find_spec("opentelemetry") is not None and find_spec("opentelemetry.sdk") is not None
HAS_OTLP = (
    HAS_SDK
    and find_spec("opentelemetry.exporter") is not None
    and find_spec("opentelemetry.exporter.otlp") is not None
)
needs_sdk = pytest.mark.skipif(not HAS_SDK, reason="the extra otel is not installed")
needs_otlp = pytest.mark.skipif(not HAS_OTLP, reason="the extra otel is not installed")


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (PARENT, True),
        (PARENT.upper(), False),
        (f"01-{TRACE}-0123456789abcdef-01", False),
        (f"00-{'0' * 32}-0123456789abcdef-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (PARENT + "\n", False),
        ("", False),
    ],
)
def test_only_a_traceparent_is_taken_up(header: str, taken: bool) -> None:
    assert traceparent_of(header) == (header if taken else None)


def memory(ratio: float = 1.0) -> tuple[Tracing, Any]:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    return Tracing(SimpleSpanProcessor(exporter), ratio), exporter


def ended(tracing: Tracing, caller: Caller, span: Any, status: int = 200) -> None:
    tracing.end(span, method="POST", route="/generate", status=status, caller=caller, code=None)


@needs_sdk
def test_a_call_has_its_queue_and_its_steps_in_it() -> None:
    tracing, exporter = memory()
    caller = Caller("r-1", ApiKey("app"), traceparent=PARENT)
    span = tracing.begin("POST", caller)
    assert caller.traceparent != PARENT
    caller.adapter, caller.version = "story", "v1"
    request = GenerateRequest(
        "1", "story", "v1", (1, 2, 3), submitted=time.monotonic() - 0.5, origin=caller.origin
    )
    tokens = (GeneratedToken(1, "a", None, special=False),) * 2
    result = GenerateResult("1", "aa", "", tokens, "length", "v1", 3, 100.0, 300.0)
    tracing.request(request, result)
    ended(tracing, caller, span)
    queue, steps, call = exporter.get_finished_spans()
    assert [one.name for one in (queue, steps, call)] == ["queue", "steps", "POST /generate"]
    assert {f"{one.context.trace_id:032x}" for one in (queue, steps, call)} == {TRACE}
    assert f"{call.parent.span_id:016x}" == PARENT.split("-")[2]
    assert queue.parent.span_id == steps.parent.span_id == call.context.span_id
    assert (queue.end_time - queue.start_time) / 1e6 == pytest.approx(100)
    assert queue.end_time == steps.start_time
    assert (steps.end_time - steps.start_time) / 1e6 == pytest.approx(300)
    assert steps.attributes["gen_ai.usage.input_tokens"] == 3
    assert steps.attributes["gen_ai.usage.output_tokens"] == 2
    for one in (queue, steps, call):
        assert one.attributes["hira.adapter"] == "story"
        assert one.attributes["hira.version"] == "v1"
    assert call.attributes["hira.key"] == "app"
    assert call.attributes["hira.request_id"] == "r-1"


@needs_sdk
def test_a_failure_is_an_error_in_its_trace() -> None:
    tracing, exporter = memory()
    caller = Caller("r-2")
    span = tracing.begin("POST", caller)
    request = EncodeRequest(
        "1", "text-classification", None, None, (), submitted=time.monotonic(), origin=caller.origin
    )
    tracing.request(request, Failure("1", "worker_lost", "x"))
    ended(tracing, caller, span, 503)
    failed, call = exporter.get_finished_spans()
    assert failed.attributes["error.type"] == "worker_lost"
    assert not failed.status.is_ok
    assert not call.status.is_ok
    assert failed.parent.span_id == call.context.span_id


@needs_sdk
def test_what_the_client_does_not_want_recorded_is_not() -> None:
    for ratio, parent, spans in ((1.0, PARENT[:-1] + "0", 0), (0.0, None, 0), (0.0, PARENT, 3)):
        tracing, exporter = memory(ratio)
        caller = Caller("r-3", traceparent=parent)
        span = tracing.begin("POST", caller)
        request = EncodeRequest(
            *("1", "text-classification", None, None, ()),
            submitted=time.monotonic(),
            origin=caller.origin,
        )
        tracing.request(request, EncodeResult("1", (), None, 1, 1.0, 1.0))
        ended(tracing, caller, span)
        assert len(exporter.get_finished_spans()) == spans


def test_without_the_setting_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; import server.edge.service, server.edge.endpoints.middleware\n"
        "sys.exit(any(one.split('.')[0] == 'opentelemetry' for one in sys.modules))"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(tmp_path / "data"), check=True
    )


def test_a_setting_that_cannot_be_met_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(endpoint: str) -> StartFailed:
        flags = {"data_dir": tmp_path, "port": free_port(), "otel_endpoint": endpoint}
        with pytest.raises(StartFailed) as caught:
            check_before_loading(load_settings(flags))
        return caught.value

    assert "no URL" in told("collector:4317").message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "hira-server[otel]" in str(told("http://collector:4318/v1/traces").fix)


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A receiver of OTLP over HTTP, and the spans that it has got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    got.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    finally:
        server.shutdown()
        server.server_close()


@needs_otlp
@pytest.mark.http
def test_spans_arrive_at_a_collector_from_a_running_server(tmp_path: Path) -> None:
    with collector() as (url, got), fake(tmp_path / "data", otel_endpoint=url) as live:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 4}}
        path = "/generate?adapter=story"
        assert live.client.post(path, json=body, headers={"traceparent": PARENT}).is_success
        assert live.end() == 0  # what is left is sent at the end
        spans = [one for one in got if one.trace_id.hex() == TRACE]
        assert sorted(one.name for one in spans) == ["POST /generate", "queue", "steps"]
        steps = next(one for one in spans if one.name == "steps")
        told = {one.key: one.value for one in steps.attributes}
        assert told["gen_ai.usage.output_tokens"].int_value == 4
        assert told["hira.version"].string_value == "story-v1"
        assert "Traceback" not in live.log.read_text()


@needs_otlp
@pytest.mark.http
def test_a_collector_that_is_away_costs_no_request(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1/traces"
    with fake(tmp_path / "data", otel_endpoint=url) as live:
        for _ in range(20):
            assert live.client.post("/predict?adapter=imdb", json={"inputs": "x"}).is_success
        assert live.end() == 0
