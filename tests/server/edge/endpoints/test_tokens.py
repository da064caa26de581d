"""Calls about tokens in vLLM's shape: what nobody knows is not dropped in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from fastapi import Request, Response

from server.edge.endpoints.middleware import RequestContext
from server.edge.endpoints.schemas_tokens import AnyDetokenizeRequest, AnyTokenizeRequest
from server.edge.endpoints.tokens import TokenEndpoints
from server.errors import Refusal

MESSAGES = [{"role": "user", "content": "a"}]


async def awaited(answer: Awaitable[Response]) -> Response:
    return await answer


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": MESSAGES}, {"tokens": [5]}])
def test_an_adapter_in_the_body_is_refused_before_anything_is_done(body: dict[str, Any]) -> None:
    service: Any = None  # nothing is asked of it
    calls, scope = TokenEndpoints(service), {"type": "http", "hira": RequestContext("r", 0.0)}
    sent = {**body, "x_vendor": 1, "adapter": "story"}
    answer = (
        calls.detokenize(Request(scope), None, AnyDetokenizeRequest.model_validate(sent))
        if "tokens" in body
        else calls.tokenize(Request(scope), None, AnyTokenizeRequest.model_validate(sent))
    )
    with pytest.raises(Refusal) as refused:
        asyncio.run(awaited(answer))
    (fault,) = refused.value.faults
    assert (fault.code, fault.field) == ("unsupported_parameter", "adapter")
