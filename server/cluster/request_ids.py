"""The id of a request in a cluster: of the form that one machine takes, and on every answer once.

Ray Serve takes over whatever a client sends as ``X-Request-Id``, or makes an id of its own, and
adds it to every response. Each of its HTTP servers, that of an HTTP replica among them, asks the
function ``middlewares`` for what stands before that; the switch that names it is in
docs/cluster.md.
"""

from __future__ import annotations

from typing import Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.admit.callers import request_id_of

REQUEST_ID_HEADER: Final = b"x-request-id"


def middlewares() -> list[Middleware]:
    """Called by Ray Serve for each of its HTTP servers."""
    return [Middleware(UsableRequestId)]


class UsableRequestId:
    """Has every request carry one id that can be used: the client's, or else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = list(scope["headers"])
            given = [value for name, value in headers if name == REQUEST_ID_HEADER]
            used = request_id_of(given[0].decode("latin-1") if given else "").encode("ascii")
            if given != [used]:
                others = [one for one in headers if one[0] != REQUEST_ID_HEADER]
                scope = {**scope, "headers": [*others, (REQUEST_ID_HEADER, used)]}
        await self.app(scope, receive, send)


class OneRequestId:
    """Leaves a response's id to Ray Serve, which adds the request's to every response.

    Both would else say the same twice.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = any(name == REQUEST_ID_HEADER for name, _ in scope.get("headers", ()))

        async def once(message: Message) -> None:
            if given and message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message["headers"] = [one for one in headers if one[0] != REQUEST_ID_HEADER]
            await send(message)

        await self.app(scope, receive, once)
