"""Ids of requests before Ray Serve sees them, and on the way back."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

from ray.serve._private.http_util import RequestIdMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.cluster.request_ids import OneRequestId, middlewares
from server.edge.admit.callers import request_id_of


def answered(*given: bytes) -> tuple[str, list[bytes]]:
    """The id by which a call went on, and the ids of its answer, through what Ray Serve adds."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ids = [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
        seen.append(request_id_of(ids[0]))
        assert ids == seen
        own = (b"x-request-id", seen[0].encode())
        await send({"type": "http.response.start", "status": 200, "headers": [own]})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    headers = [(b"host", b"x"), *((b"x-request-id", one) for one in given)]
    scope: Any = {"type": "http", "headers": headers}
    whole: ASGIApp = RequestIdMiddleware(OneRequestId(app))
    for one in middlewares():  # Ray Serve puts them around its own
        whole = one.cls(whole, *one.args, **one.kwargs)

    async def called() -> None:
        await whole(scope, receive, send)

    asyncio.run(called())
    headers = sent[0]["headers"]
    return seen[0], [value for name, value in headers if name.lower() == b"x-request-id"]


def test_an_id_of_the_client_is_kept_and_said_once() -> None:
    assert answered(b"abc-1") == ("abc-1", [b"abc-1"])
    assert answered(b"abc-1", b"abc-2") == ("abc-1", [b"abc-1"]), "as on one machine, the first"


@pytest.mark.parametrize("given", [b"no good", b"", b"x" * 129, "é".encode()])
def test_what_is_no_id_is_replaced_before_anything_is_logged_of_it(given: bytes) -> None:
    used, said = answered(given)
    assert re.fullmatch(r"[0-9a-f]{32}", used)
    assert said == [used.encode()]


def test_a_call_without_an_id_gets_one() -> None:
    used, said = answered()
    assert re.fullmatch(r"[0-9a-f]{32}", used)
    assert said == [used.encode()]
