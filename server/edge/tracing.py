"""Traces of requests by OpenTelemetry, from the edge over the queue to the steps of the engine.

Only where the settings name a collector, and with the extra ``otel``: nothing of OpenTelemetry is
imported otherwise. All spans are made in the HTTP process, since every answer says how long its
request waited and computed; so a cluster's are the same, and no engine waits for a collector. A
``traceparent`` that comes with a call is taken up, and travels with its requests in any case.
"""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from server.edge.admit.callers import Caller
from server.messages import EncodeResult, Failure, GenerateResult, Request
from server.version import package_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanProcessor
    from opentelemetry.trace import Span, Tracer

TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
SERVICE_NAME: Final = "hira-server"
EXPORT_S: Final = 5.0  # that a collector gets for a batch of spans
END_S: Final = 3.0  # that it gets for the last one


def traceparent_of(header: str) -> str | None:
    """A client's ``traceparent``, if it is one."""
    return header if TRACEPARENT.fullmatch(header) else None


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector, by OTLP over HTTP.

    Raises:
        ImportError: The extra ``otel`` is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)


class Tracing:
    """See the module. Made in the process that uses it: it has a thread.

    Args:
        processor: What becomes of spans that have ended.
        ratio: Of the calls that bring no decision of their own, how many are recorded.
    """

    def __init__(self, processor: SpanProcessor, ratio: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        told = {"service.name": SERVICE_NAME, "service.version": package_version()}
        self._provider = TracerProvider(
            resource=Resource.create(told),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            shutdown_on_exit=False,  # `close` is bounded, that is not
        )
        self._provider.add_span_processor(processor)
        self._tracer: Tracer = self._provider.get_tracer(SERVICE_NAME, package_version())

    @classmethod
    def to_collector(cls, endpoint: str, ratio: float) -> Tracing:
        """Spans go to a collector, in batches, from a thread.

        Raises:
            ImportError: The extra ``otel`` is not installed.
        """
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return cls(BatchSpanProcessor(otlp_exporter(endpoint)), ratio)

    def begin(self, method: str, caller: Caller) -> Span:
        """The span of a call; from here on it is the parent of what is done for it.

        Args:
            method: Of HTTP.
            caller: Whose ``traceparent`` is taken up, and replaced by the span's own.
        """
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            method, self._context(caller.traceparent), kind=SpanKind.SERVER
        )
        found = span.get_span_context()
        flags = int(found.trace_flags)
        caller.traceparent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{flags:02x}"
        return span

    def end(
        self, span: Span, *, method: str, route: str, status: int, caller: Caller, code: str | None
    ) -> None:
        """The end of a call.

        Args:
            route: As the metrics name it.
            status: Of its answer.
            caller: Who made it, and for which adapter.
            code: Of the error, if there was one.
        """
        from opentelemetry.trace import StatusCode

        span.update_name(f"{method} {route}")
        told: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "hira.request_id": caller.request_id,
            "hira.key": None if caller.key is None else caller.key.name,
            "hira.adapter": caller.adapter,
            "hira.version": caller.version,
            "error.type": code,
        }
        span.set_attributes({name: one for name, one in told.items() if one is not None})
        if status >= 500:
            span.set_status(StatusCode.ERROR, code)
        span.end()

    def request(self, request: Request, event: EncodeResult | GenerateResult | Failure) -> None:
        """The spans of a request that has ended: how long it waited, and its steps."""
        from opentelemetry.trace import StatusCode

        parent = self._context(request.origin.traceparent)
        now_ns = time.time_ns()
        began_ns = now_ns - int((time.monotonic() - request.submitted) * 1e9)
        told: dict[str, Any] = {
            "hira.adapter": request.adapter or "base",
            "hira.version": request.version or "base",
        }
        if isinstance(event, Failure):
            span = self._tracer.start_span("failed", parent, attributes=told, start_time=began_ns)
            span.set_attribute("error.type", event.code)
            span.set_status(StatusCode.ERROR, event.code)
            span.end(now_ns)
            return
        waited_ns = began_ns + int(event.queue_ms * 1e6)
        self._tracer.start_span("queue", parent, attributes=told, start_time=began_ns).end(
            waited_ns
        )
        told["gen_ai.usage.input_tokens"] = event.prompt_tokens
        if isinstance(event, GenerateResult):
            told["gen_ai.usage.output_tokens"] = len(event.tokens)
        self._tracer.start_span("steps", parent, attributes=told, start_time=waited_ns).end(
            waited_ns + int(event.compute_ms * 1e6)
        )

    def close(self) -> None:
        """Send what is left, if the collector takes it in time."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(END_S)

    def _context(self, traceparent: str | None) -> Any:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if traceparent is None else {"traceparent": traceparent}
        return TraceContextTextMapPropagator().extract(carrier)
