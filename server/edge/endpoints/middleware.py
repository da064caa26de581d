"""Around every call: its id, the limits on its body, safe headers, its metrics and its log line.

Plain ASGI, one layer: a layer of Starlette's own kind would hide the client's disconnect from the
endpoints and cost a task per request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.tasks import Lane
from server.edge.admit.body_budget import HeldBody
from server.edge.admit.callers import Caller, request_id_of, set_caller
from server.edge.admit.connections import HEAD_FAULT
from server.edge.admit.key_file import ApiKey
from server.edge.endpoints.audited import INCOMPLETE_HEADER, AuditedCall, is_audited
from server.edge.endpoints.json_text import written
from server.edge.service import Service
from server.edge.tracing import traceparent_of
from server.errors import PROBLEM_TYPE, Refusal

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

QUERY_BYTES: Final = 4096
LENGTH_DIGITS: Final = 20  # of a content length: more than any file has
INFERENCE: Final = frozenset(
    {"/predict", "/embed", "/similarity", "/rerank", "/v2/rerank", "/generate", "/generate_stream"}
)
# The paths that are for one lane whatever their bodies say.
LANE_PATHS: Final[dict[Lane, frozenset[str]]] = {
    "encode": frozenset(
        {"/predict", "/embed", "/similarity", "/rerank", "/v2/rerank"}
        | {"/v1/embeddings", "/v1/rerank", "/v1/score"}
    ),
    "generate": frozenset(
        {"/generate", "/generate_stream", "/v1/completions"}
        | {"/v1/chat/completions", "/v1/responses"}
    ),
}
# What needs a key where inference does, and no worker.
LOOKUPS: Final = frozenset({"/info", "/tokenize", "/detokenize", "/decode"})
UPLOADS: Final = "/admin/adapters"  # the one path whose forms go to disk
IGNORED_HEADER: Final = b"x-ignored-fields"
# As ASGI has headers: they go out with every response, so they are not made anew for each.
SAFE_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
CONTENT_POLICY: Final = (
    b"content-security-policy",
    b"default-src 'none'; frame-ancestors 'none'",
)


@dataclass(slots=True)
class RequestContext:
    """What is known of one call; endpoints fill in what they resolve."""

    request_id: str
    began: float  # monotonic
    status: int = 0
    adapter: str | None = ""  # "": none resolved, None: the base
    arm: str | None = None  # which of the versions that share its adapter's requests
    refused: str | None = None  # the code of an error response
    ignored: tuple[str, ...] = ()  # fields of the body without effect, in ASCII
    caller: Caller | None = None
    span: Any = None  # of OpenTelemetry, where there is one


class BodyRefused(HTTPException):
    """A body that broke a limit while it was read: FastAPI lets only its own kind pass there."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status, detail=refusal.code)
        self.refusal = refusal


class Json(JSONResponse):
    """JSON in UTF-8, also of text that came as a lone surrogate and cannot be written so."""

    def render(self, content: Any) -> bytes:
        return written(content)


def error_response(scope: Scope, refusal: Refusal) -> Response:
    """The refusal in the shape that the path calls for."""
    context = scope.get("hira")
    openai = is_openai(scope)
    if isinstance(context, RequestContext):
        context.refused = refusal.openai_code if openai else refusal.code
    if openai:
        return Json(refusal.openai(), refusal.openai_status, headers=refusal.all_headers())
    return Json(
        refusal.problem(),
        refusal.status,
        headers=refusal.all_headers(),
        media_type=PROBLEM_TYPE,
    )


def without_prefix(scope: Scope) -> Scope:
    """A call below a prefix, such as a route prefix of Ray Serve's, as one without it: whatever is
    decided by the path holds there too. The prefix is in both fields that ASGI has for paths."""
    prefix, path = str(scope.get("root_path", "")).rstrip("/"), str(scope["path"])
    if not prefix or not f"{path}/".startswith(f"{prefix}/"):
        return scope
    return {**scope, "path": path[len(prefix) :] or "/", "root_path": ""}


def admit_caller(scope: Scope, key: ApiKey | None) -> None:
    """Say with which key a call was admitted; without any, None."""
    context = scope["hira"]
    assert isinstance(context, RequestContext)
    assert context.caller is not None
    context.caller.key = key


def is_openai(scope: Scope) -> bool:
    """Whether a call is under /v1, where errors have OpenAI's shape and statuses."""
    return str(scope.get("path", "")).startswith("/v1/")


class RequestMiddleware:
    """See the module."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = without_prefix(scope)
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get("x-request-id", ""))
        context = RequestContext(request_id, began=time.monotonic())
        context.caller = Caller(
            context.request_id, traceparent=traceparent_of(headers.get("traceparent", ""))
        )
        set_caller(context.caller)
        tracing = self.service.tracing
        if tracing is not None:
            context.span = tracing.begin(scope["method"], context.caller)
        scope["hira"], scope["hira_service"] = context, self.service
        self.service.refresh()

        call: AuditedCall | None = None

        async def finish(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                if call is not None:
                    await call.end(context.status, context.refused)
                    if call.incomplete:
                        message["headers"] = [*message.get("headers", ()), INCOMPLETE_HEADER]
                self._add_headers(context, message)
            await send(message)

        held = self.service.bodies.hold()
        try:
            # An upload goes to disk as it comes; everything else is held in memory.
            form = headers.get("content-type", "").startswith("multipart/")
            uploads = form and scope["path"] == UPLOADS and scope["method"] == "POST"
            limit = self._limit(scope, headers, uploads=uploads)
            self._admit(scope, headers)
            log = self.service.audit_log
            if log is not None and is_audited(scope):
                asked = AuditedCall(log, self.service.slow_work, scope, context.caller)
                await asked.begin()
                call = asked
            bounded = self._bounded(receive, limit, None if uploads else held)
            if not uploads:
                self._hold(held, _stated_bytes(headers))
            await self.app(scope, bounded, finish)
        except Refusal as refusal:
            await error_response(scope, refusal)(scope, receive, finish)
        except ClientDisconnect:
            # In the middle of its own body: nobody is there to answer.
            logger.debug("request %s: the client left", context.request_id)
        except Exception:
            logger.exception("request %s failed", context.request_id)
            if context.status:
                raise  # half an answer is out: the connection must break, not end well
            failed = Refusal.because(
                "internal",
                "The server failed on this request.",
                fix=f"Tell the operator the request id {context.request_id}.",
            )
            await error_response(scope, failed)(scope, receive, finish)
        finally:
            held.release()
            self._note(scope, context)
            if call is not None:  # nobody was there to be answered
                await call.end(499, context.refused)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Turn away whom no body could help, before it is read: without a key, or too many.

        The endpoints have guards of their own; this one makes refusals cheap.
        """
        path, keys = scope["path"], self.service.keys
        authorization = headers.get("authorization")
        if path.startswith("/admin"):
            admit_caller(scope, keys.admit_admin(authorization))
            return
        if path == "/metrics":
            keys.admit_metrics(authorization)
            return
        lookup = path in LOOKUPS
        posted_to_root = path == "/" and scope["method"] == "POST"
        if not (lookup or path in INFERENCE or path.startswith("/v1/") or posted_to_root):
            return
        key = keys.admit_inference(authorization)
        admit_caller(scope, key)
        named = _adapter_of(scope["query_string"])
        if named is not None:
            self.service.targets.check_scope(named, "adapter")
        if scope["method"] != "POST":
            return
        if not lookup:
            self.service.dispatcher.check_early(
                named, _lane_of_path(path), self._deadline(scope, headers)
            )
        if key is not None:
            self.service.key_usage.count_request(key)

    def _deadline(self, scope: Scope, headers: Headers) -> float | None:
        """When a call must be done; None where its header is no time, which the endpoint says."""
        context = scope["hira"]
        try:
            return self.service.deadline(context.began, headers.get("x-timeout-seconds"))
        except Refusal:
            return None

    def _limit(self, scope: Scope, headers: Headers, *, uploads: bool) -> int:
        settings = self.service.settings
        fault = scope.get(HEAD_FAULT)
        if fault is not None:
            raise fault
        limit = int(settings.max_upload_bytes if uploads else settings.max_body_bytes)
        if len(scope["query_string"]) > QUERY_BYTES:
            raise Refusal.because(
                "invalid_request",
                "The query is too long.",
                found=f"{len(scope['query_string'])} bytes",
                expected=f"at most {QUERY_BYTES}",
            )
        length = _stated_bytes(headers)
        if length > limit:
            raise too_large(limit, uploads=uploads, found=f"{length} bytes")
        return limit

    def _hold(self, held: HeldBody, size_bytes: int) -> None:
        most = int(self.service.settings.max_pending_body_bytes)
        held.grow(size_bytes, most, self.service.dispatcher.admission)

    def _bounded(self, receive: Receive, limit: int, held: HeldBody | None) -> Receive:
        """Count the body as it comes, and give it up when it is too large or too slow.

        The patience is for the whole of a body; for every piece of an upload, which may be
        gigabytes, and of which nothing is held.
        """
        patience_s = self.service.settings.client_timeout_s
        taken, complete = 0, False
        began = time.monotonic()

        async def bounded() -> Message:
            nonlocal taken, complete
            if complete:
                # The endpoint waits for the client to leave: as long as it likes.
                return await receive()
            left_s = max(0.0, began + patience_s - time.monotonic()) if held else patience_s
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError:
                refusal = Refusal.because(
                    "body_too_slow",
                    "The body did not arrive in time.",
                    expected=f"{patience_s:g} s",
                    headers={"Connection": "close"},
                )
                raise BodyRefused(refusal) from None
            taken += len(message.get("body", b""))
            if taken > limit:
                raise BodyRefused(too_large(limit, uploads=held is None))
            if held is not None:
                try:
                    self._hold(held, taken)
                except Refusal as refusal:
                    raise BodyRefused(refusal) from None
            complete = not message.get("more_body", False)
            return message

        return bounded

    def _add_headers(self, context: RequestContext, message: Message) -> None:
        headers = list(message.get("headers", ()))
        there = {name.lower() for name, _ in headers}
        headers.append((b"x-request-id", context.request_id.encode("ascii")))
        if context.ignored:
            headers.append((IGNORED_HEADER, ", ".join(context.ignored).encode("ascii")))
        key = None if context.caller is None else context.caller.key
        if key is not None and key.quotas.any:
            headers += self.service.key_usage.headers(key)
        headers += [one for one in SAFE_HEADERS if one[0] not in there]
        if CONTENT_POLICY[0] not in there:
            headers.append(CONTENT_POLICY)
        message["headers"] = headers

    def _note(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.monotonic() - context.began
        path = scope["path"]
        unmatched = path if path in INFERENCE | LOOKUPS else "unmatched"
        endpoint = str(getattr(scope.get("route"), "path", unmatched))
        status = context.status or 499
        metrics = self.service.metrics
        if metrics is not None:
            metrics.request(endpoint, context.adapter, status, seconds)
            if context.arm is not None and context.adapter:
                metrics.canary_request(context.adapter, context.arm, status)
            if context.caller is not None and context.caller.key is not None:
                metrics.key_request(context.caller.key.name, status)
            if context.refused:
                metrics.refusal(context.refused)
        tracing = self.service.tracing
        if tracing is not None and context.span is not None and context.caller is not None:
            tracing.end(
                context.span,
                method=scope["method"],
                route=endpoint,
                status=status,
                caller=context.caller,
                code=context.refused,
            )
        if self.service.settings.access_log:
            access_logger.info(
                "%s %s %d %.1f ms id=%s adapter=%s%s",
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                status,
                seconds * 1e3,
                context.request_id,
                context.adapter or "-",
                f" code={context.refused}" if context.refused else "",
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "ms": round(seconds * 1e3, 1),
                    "code": context.refused,
                },
            )


def too_large(limit: int, *, uploads: bool, found: str | None = None) -> Refusal:
    return Refusal.because(
        "upload_too_large" if uploads else "body_too_large",
        "The upload is too large." if uploads else "The body is too large.",
        found=found,
        expected=f"at most {limit} bytes",
        fix="Send less, or ask the operator to raise "
        + ("max_upload_bytes." if uploads else "max_body_bytes."),
    )


def _lane_of_path(path: str) -> Lane | None:
    return next((lane for lane, paths in LANE_PATHS.items() if path in paths), None)


def _stated_bytes(headers: Headers) -> int:
    """How long a body says that it is; 0 where it does not."""
    length = headers.get("content-length", "")
    # Other scripts have digits too, and a number of thousands of digits is none to compute with.
    return int(length[:LENGTH_DIGITS]) if length.isascii() and length.isdigit() else 0


def _adapter_of(query: bytes) -> str | None:
    """The adapter that a query names, or None where it names none or several."""
    if b"adapter=" not in query:
        return None
    names = [value for name, value in parse_qsl(query.decode("latin-1")) if name == "adapter"]
    return names[0] if len(names) == 1 else None
