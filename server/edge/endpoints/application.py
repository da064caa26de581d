"""Puts the endpoints into a FastAPI app: routes with their guards, and every error in its shape.

Whoever runs the app (LitServe, Ray Serve) brings it with its own life; what it answers is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from reprlib import Repr
from typing import Any, Final

from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from server.edge.endpoints.middleware import BodyRefused, admit_caller, error_response
from server.edge.endpoints.openapi import amended
from server.edge.endpoints.queries import check_query
from server.edge.endpoints.routes import Endpoint
from server.edge.service import Service
from server.errors import Fault, Refusal

TITLE: Final = "hira-server"
DESCRIPTION: Final = "Many HiRA and LoRA adapters on one 4-bit base model."
BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none"})  # of unions, in locations
# FastAPI's own: they ask other machines for scripts.
FASTAPI_PAGES: Final = frozenset({"/docs", "/redoc", "/docs/oauth2-redirect"})
# What a fault shows of a value: repr() of all of a large one would take its time.
SHORT_REPR: Final = Repr()
SHORT_REPR.maxlevel = 2
SHORT_REPR.maxlist = SHORT_REPR.maxtuple = 120
SHORT_REPR.maxstring = SHORT_REPR.maxlong = SHORT_REPR.maxother = 400
_bearer_scheme = HTTPBearer(auto_error=False)


def describe_app(app: FastAPI, version: str) -> None:
    """Give an app its title and the shapes of its errors.

    Args:
        version: Of this package.
    """
    app.title, app.version, app.description = TITLE, version, DESCRIPTION
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


def add_endpoints(
    app: FastAPI, service: Service, inference: Sequence[Endpoint], others: Sequence[Endpoint]
) -> None:
    """Add routes with their guards, and what the OpenAPI document needs.

    Args:
        service: Whose keys are asked for.
        inference: Routes that need an inference key, where there are any.
        others: Those of the administration need the admin key, the rest none.
    """
    app.router.routes[:] = [
        one for one in app.router.routes if getattr(one, "path", "") not in FASTAPI_PAGES
    ]
    guards = _Guards(service)
    for route in inference:
        asked = [Depends(guards.admit_inference), Depends(check_query)]
        app.add_api_route(route.path, route.endpoint, dependencies=asked, **route.options())
    for route in others:
        admin = [Depends(guards.admit_admin), Depends(check_query)]
        app.add_api_route(
            route.path,
            route.endpoint,
            dependencies=admin if route.tag == "Admin" else [],
            **route.options(),
        )
    openapi = amended(app, [*inference, *others])
    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way


class _Guards:
    """Dependencies of the routes: who may ask, and that all acknowledged changes are known."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def admit_inference(
        self,
        request: Request,
        key: HTTPAuthorizationCredentials | None = Security(_bearer_scheme),  # noqa: B008
    ) -> None:
        found = self.service.keys.admit_inference(request.headers.get("authorization"))
        admit_caller(request.scope, found)
        await self.service.catch_up()

    async def admit_admin(
        self,
        request: Request,
        key: HTTPAuthorizationCredentials | None = Security(_bearer_scheme),  # noqa: B008
    ) -> None:
        found = self.service.keys.admit_admin(request.headers.get("authorization"))
        admit_caller(request.scope, found)
        await self.service.catch_up()


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error_response(request.scope, error)


async def _on_http(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such page, wrong method, a body that broke a limit."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return error_response(request.scope, error.refusal)
    path = request.scope["path"]
    match error.status_code:
        case 404:
            refusal = Refusal.because(
                "not_found", "There is no such page.", found=path[:200], fix="See /docs."
            )
        case 405:
            refusal = Refusal.because(
                "method_not_allowed",
                f"{request.method} is not allowed here.",
                found=request.method,
                expected=(allowed := _allowed(request)),
                headers={"Allow": allowed},
            )
        case 400:
            refusal = Refusal.because(
                "malformed_body", "The body cannot be read.", expected="JSON in UTF-8"
            )
        case _:
            refusal = Refusal.because("internal", str(error.detail))
    return error_response(request.scope, refusal)


def _allowed(request: Request) -> str:
    """All methods of a path: Starlette names those of its first route only."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A body or a query that does not fit its schema: every fault names its field."""
    assert isinstance(error, RequestValidationError)
    by_field: dict[str | None, Fault] = {}
    for one in error.errors()[:100]:
        fault = _fault(dict(one), request)
        before = by_field.get(fault.field)
        # The branches of a union fail one by one at the same field: one fault for people.
        by_field[fault.field] = (
            fault
            if before is None
            else replace(before, message=f"{before.message}; or: {fault.message}")
        )
    return error_response(request.scope, Refusal(list(by_field.values())[:20]))


def _fault(found: Mapping[str, Any], request: Request) -> Fault:
    if found["type"] == "json_invalid":
        reason = str(found.get("ctx", {}).get("error", "not JSON"))
        at = f" at character {found['loc'][-1]}"
        return Fault("malformed_body", "The body is not JSON.", reason + at, "JSON in UTF-8")
    content_type = request.headers.get("content-type", "")
    fix = None
    if tuple(found["loc"]) == ("body",) and "json" not in content_type:
        fix = "Send the header Content-Type: application/json."
    value = found.get("input")
    shown = (
        None if isinstance(value, dict | bytes) or value is None else SHORT_REPR.repr(value)[:120]
    )
    return Fault("invalid_request", str(found["msg"]), shown, fix=fix, field=_field(found["loc"]))


def _field(location: Sequence[int | str]) -> str | None:
    """``inputs.0`` of pydantic's location: without the names of a union's branches."""
    kept: list[str] = []
    for part in location[1:]:
        if isinstance(part, str) and (not part.isidentifier() or part in BRANCHES):
            continue
        kept.append(str(part))
    return ".".join(kept) or None
