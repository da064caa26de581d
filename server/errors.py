"""One table: what can go wrong → the HTTP status that says so.

Every code that an adapter error, the engine or the edge uses has exactly one row here. Native
calls answer with RFC 9457 problem details, calls under /v1 with OpenAI's error object; both are
built here from the same fault, so they never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from adapters.errors import AdapterFaults, ExplainedError
from server.messages import Failure

CONTEXT_CODE: Final = "context_length_exceeded"  # OpenAI's, by which clients choose another model
PROBLEM_TYPE: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One code: the status it is answered with and its short name for people."""

    status: int
    title: str


TABLE: Final[Mapping[str, ErrorCode]] = {
    # The request
    "malformed_body": ErrorCode(422, "The body cannot be read"),
    "adapter_required": ErrorCode(400, "An adapter must be named"),
    "adapter_conflict": ErrorCode(400, "Two different adapters are named"),
    "task_mismatch": ErrorCode(400, "The adapter does another task"),
    "unsupported_parameter": ErrorCode(400, "A parameter that cannot be honoured"),
    "chat_template_missing": ErrorCode(400, "The base has no chat template"),
    "chat_template_failed": ErrorCode(422, "The chat template could not be run"),
    "unsupported_grammar": ErrorCode(422, "The grammar cannot be honoured"),
    "grammar_too_complex": ErrorCode(422, "The grammar takes too much"),
    "grammar_unreachable": ErrorCode(422, "No text of this base fits the grammar"),
    "invalid_request": ErrorCode(422, "The request is not valid"),
    "invalid_input": ErrorCode(422, "An input cannot be given to the model"),
    "input_too_long": ErrorCode(413, "The input is too long"),
    "context_length_exceeded": ErrorCode(400, "The prompt does not fit the context"),
    "body_too_large": ErrorCode(413, "The body is too large"),
    "request_too_large": ErrorCode(413, "The request can never fit"),
    "body_too_slow": ErrorCode(408, "The body came too slowly"),
    "malformed_request": ErrorCode(400, "The request is not HTTP"),
    "head_too_large": ErrorCode(431, "The headers are too large"),
    "head_too_slow": ErrorCode(408, "The headers came too slowly"),
    "not_found": ErrorCode(404, "No such page"),
    "method_not_allowed": ErrorCode(405, "The method is not allowed"),
    # Keys
    "key_missing": ErrorCode(401, "A key is needed"),
    "key_wrong": ErrorCode(403, "The key is not accepted"),
    "key_expired": ErrorCode(403, "The key has expired"),
    "adapter_forbidden": ErrorCode(403, "The key is not for this adapter"),
    "rate_limit_exceeded": ErrorCode(429, "The key's quota is used up"),
    # An adapter
    "adapter_not_found": ErrorCode(404, "No such adapter"),
    "adapter_exists": ErrorCode(409, "The name is taken"),
    "version_not_found": ErrorCode(404, "The name was never on this version"),
    "version_gone": ErrorCode(410, "The bytes of this version are gone"),
    "already_current": ErrorCode(409, "The name is on this version already"),
    "name_moved": ErrorCode(409, "The name has moved meanwhile"),
    "alias_to_itself": ErrorCode(422, "An alias cannot point to itself"),
    "alias_of_alias": ErrorCode(422, "An alias cannot point to an alias"),
    "adapter_aliased": ErrorCode(409, "Aliases point to the adapter"),
    "invalid_share": ErrorCode(422, "No share of the traffic"),
    "canary_not_found": ErrorCode(404, "The name has no canary"),
    "unsafe_format": ErrorCode(422, "The adapter's files are not safe to read"),
    "corrupt_file": ErrorCode(422, "A file is damaged"),
    "unsupported_method": ErrorCode(422, "The adapter's method is not supported"),
    "unsupported_option": ErrorCode(422, "An option of the adapter is not supported"),
    "shape_mismatch": ErrorCode(422, "A tensor does not fit the base"),
    "base_mismatch": ErrorCode(422, "The adapter belongs to another base"),
    "unmatched_tensors": ErrorCode(422, "Tensors match no layer of the base"),
    "missing_tensors": ErrorCode(422, "Tensors are missing"),
    "non_finite": ErrorCode(422, "The adapter holds NaN or infinity"),
    "invalid_name": ErrorCode(422, "The name is not allowed"),
    "source_forbidden": ErrorCode(403, "The source is not allowed"),
    "source_unavailable": ErrorCode(422, "The source cannot be read"),
    "upload_too_large": ErrorCode(413, "The upload is too large"),
    "store_full": ErrorCode(507, "The adapter store is full"),
    "audit_unwritable": ErrorCode(507, "The audit log cannot be written"),
    # The server
    "overloaded": ErrorCode(429, "Too many requests are waiting"),
    "wait_too_long": ErrorCode(429, "The answer would come after the deadline"),
    "too_many_connections": ErrorCode(503, "Too many connections are open"),
    "starting": ErrorCode(503, "The server is starting"),
    "registry_unavailable": ErrorCode(503, "The registry cannot be read or written"),
    "store_unavailable": ErrorCode(503, "The adapter store cannot be reached"),
    "draining": ErrorCode(503, "The server is stopping"),
    "restarting": ErrorCode(503, "The HTTP process is being restarted"),
    "worker_lost": ErrorCode(503, "The inference worker was lost"),
    "worker_silent": ErrorCode(503, "The inference worker does not answer"),
    "adapter_quarantined": ErrorCode(503, "The adapter failed too often"),
    "deadline_exceeded": ErrorCode(504, "The deadline passed"),
    "cancelled": ErrorCode(499, "The client left"),
    "adapter_error": ErrorCode(500, "The adapter failed"),
    "adapter_failed": ErrorCode(500, "The adapter failed"),
    "base_failed": ErrorCode(500, "The base failed"),
    "segment_mismatch": ErrorCode(500, "The batch was put together wrongly"),
    "slot_not_resident": ErrorCode(500, "The adapter was not on the device"),
    "internal": ErrorCode(500, "The server failed"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, as values: what a response says and where it came from."""

    code: str
    message: str
    found: str | None = None
    expected: str | None = None
    fix: str | None = None
    field: str | None = None  # where in the body or the query, dotted
    limit_tokens: int | None = None  # of the context, where that was exceeded

    @classmethod
    def of(cls, error: ExplainedError | Failure, field: str | None = None) -> Self:
        parts = (error.message, error.found, error.expected, error.fix)
        return cls(error.code, *parts, field, error.limit_tokens)

    def parts(self) -> dict[str, str]:
        """The details that are there, in the order in which people want them."""
        named = {
            "field": self.field,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }
        return {name: text for name, text in named.items() if text is not None}


@dataclass(eq=False)
class Refusal(Exception):
    """A request that ends here with an error response.

    Args:
        faults: At least one; the first gives the status and the code.
        headers: For the response, such as Retry-After.
    """

    faults: Sequence[Fault]
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def because(
        cls,
        code: str,
        message: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
        field: str | None = None,
        limit_tokens: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        fault = Fault(code, message, found, expected, fix, field, limit_tokens)
        return cls((fault,), headers or {})

    @classmethod
    def of(cls, error: ExplainedError | Failure, field: str | None = None) -> Self:
        if isinstance(error, AdapterFaults):
            return cls(tuple(Fault.of(fault, field) for fault in error.faults))
        headers = {}
        if isinstance(error, Failure) and error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        return cls((Fault.of(error, field),), headers)

    def faults_of(self, name: str, field: str) -> list[Fault]:
        """Its faults as those of one adapter of several; ``field`` is where that one is named."""
        return [
            replace(fault, message=f"{name}: {fault.message}", field=field) for fault in self.faults
        ]

    def __str__(self) -> str:
        return "; ".join(f"{fault.code}: {fault.message}" for fault in self.faults)

    @property
    def code(self) -> str:
        return self.faults[0].code

    @property
    def status(self) -> int:
        return row_of(self.code).status

    def all_headers(self) -> dict[str, str]:
        """The given headers and those that the status calls for."""
        headers = dict(self.headers)
        if self.status == 401:
            headers.setdefault("WWW-Authenticate", "Bearer")
        if self.status == 503:
            headers.setdefault("Retry-After", "1")
        return headers

    def problem(self) -> dict[str, Any]:
        """RFC 9457 problem details."""
        first, row = self.faults[0], row_of(self.code)
        body: dict[str, Any] = {
            "type": f"urn:hira:error:{first.code}",
            "title": row.title,
            "status": row.status,
            "detail": first.message,
            "code": first.code,
            **first.parts(),
            # As text-generation-inference and text-embeddings-inference name them.
            "error": first.message,
            "error_type": self.error_type,
        }
        if len(self.faults) > 1:
            body["problems"] = [
                {"code": fault.code, "detail": fault.message, **fault.parts()}
                for fault in self.faults
            ]
        return body

    @property
    def error_type(self) -> str:
        """TGI's type of the error, by which its clients choose what they raise; else the code."""
        status = self.status
        if self.code in {"adapter_not_found", "not_found", "method_not_allowed"}:
            return self.code
        if status in {400, 413, 422}:
            return "validation"
        return {429: "overloaded", 500: "generation"}.get(status, self.code)

    @property
    def openai_code(self) -> str:
        """The code under /v1: a text that exceeds the context has OpenAI's there."""
        return self.code if self.faults[0].limit_tokens is None else CONTEXT_CODE

    @property
    def openai_status(self) -> int:
        """The status under /v1, where what a body has wrong is a bad request."""
        status = row_of(self.openai_code).status
        return 400 if status == 422 else status

    def openai(self) -> dict[str, Any]:
        """OpenAI's error object, with the same code but for `openai_code`."""
        first = self.faults[0]
        details = [f"{name}: {text}" for name, text in first.parts().items() if name != "field"]
        message = first.message
        if first.limit_tokens is not None:
            # In the words by which clients know it, and find the number.
            message = (
                f"This model's maximum context length is {first.limit_tokens} tokens. However, "
                f"your request has {first.found or 'more'}. Please reduce its length"
            )
        return {
            "error": {
                "message": "; ".join([message, *details]),
                "type": _openai_type(self.openai_status),
                "param": first.field,
                "code": self.openai_code,
            }
        }


def row_of(code: str) -> ErrorCode:
    """The row of a code; one that has none is a defect of ours and answered as such."""
    return TABLE.get(code, TABLE["internal"])


def _openai_type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"
