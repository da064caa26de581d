"""What FastAPI does not say of the endpoints in the OpenAPI document.

Media types other than JSON (problem details, event streams, Prometheus text), and that inference
keys are optional. A document that is right can be tested against: every answer is held to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from fastapi import FastAPI

from server.edge.endpoints.examples import add_examples
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas import ProblemDetail
from server.errors import PROBLEM_TYPE

JSON_TYPE: Final = "application/json"
SSE_TYPE: Final = "text/event-stream"
# Of one server-sent event, as OpenAPI 3.2 has them: its fields as they are on the wire.
EVENT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "contentMediaType": JSON_TYPE}},
}


def amended(app: FastAPI, endpoints: Iterable[Endpoint]) -> Callable[[], dict[str, Any]]:
    """A replacement of ``app.openapi``: FastAPI's document with the rest said.

    Args:
        app: Whose document it is; its own ``openapi`` is called once.
        endpoints: All that are in it.
    """
    plain = app.openapi
    found = {
        (one.path.replace(":path}", "}"), method.lower()): one
        for one in endpoints
        for method in one.methods
    }
    document: dict[str, Any] | None = None

    def openapi() -> dict[str, Any]:
        nonlocal document
        if document is None:
            document = plain()
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    if (path, method) in found:
                        _amend(operation, found[path, method])
                    add_examples(path, method, operation)
        return document

    return openapi


def _amend(operation: dict[str, Any], endpoint: Endpoint) -> None:
    if not endpoint.answers(422):
        operation["responses"].pop("422", None)  # FastAPI's own, wherever there is a body
    for status, response in operation["responses"].items():
        content = response.get("content", {})
        if not status.isdigit() or JSON_TYPE not in content:
            continue
        if int(status) >= 400 and endpoint.error is ProblemDetail and endpoint.answers(int(status)):
            response["content"] = {PROBLEM_TYPE: content[JSON_TYPE]}
        elif int(status) < 400 and endpoint.media_type == SSE_TYPE:
            response["content"] = {SSE_TYPE: {"schema": _event(content[JSON_TYPE]["schema"])}}
        elif int(status) < 400 and endpoint.media_type != JSON_TYPE:
            response["content"] = {endpoint.media_type: {"schema": {"type": "string"}}}
        elif int(status) < 400 and endpoint.streams:
            content[SSE_TYPE] = {"schema": EVENT}
    if "security" in operation and endpoint.tag != "Admin":
        operation["security"].append({})  # no key is needed until the operator sets some


def _event(content: dict[str, Any]) -> dict[str, Any]:
    """An event whose data are JSON of this schema."""
    told = {**EVENT["properties"]["data"], "contentSchema": content}
    return {**EVENT, "properties": {"data": told}}
