"""A route and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.edge.endpoints.schemas import ProblemDetail

NATIVE_STATUSES = (400, 401, 403, 404, 408, 413, 422, 429, 431, 500, 503, 504)
OPENAI_STATUSES = tuple(status for status in NATIVE_STATUSES if status != 422)


@dataclass(frozen=True)
class Endpoint:
    """One route and what the OpenAPI document says of it."""

    path: str
    endpoint: Callable[..., Any]
    methods: tuple[str, ...]
    tag: str
    answer: Any = None
    media_type: str = "application/json"
    error: Any = ProblemDetail
    statuses: tuple[int, ...] = NATIVE_STATUSES
    success: int = 200
    also: tuple[int, ...] = ()  # other statuses with the same answer
    streams: bool = False  # answers with server-sent events where the body asks for them
    extra: dict[str, Any] = field(default_factory=dict)

    def answers(self, status: int) -> bool:
        """Whether ``status`` is one of its errors, in the shape that ``error`` says."""
        return status in self.statuses

    def options(self) -> dict[str, Any]:
        """Keyword arguments of FastAPI's ``add_api_route``."""
        responses: dict[int | str, dict[str, Any]] = {
            status: {"model": self.error} for status in self.statuses
        }
        if self.answer is not None:
            for status in (self.success, *self.also):
                responses[status] = {"model": self.answer, "description": "The answer"}
        return {
            "methods": list(self.methods),
            "tags": [self.tag],
            "responses": responses,
            "response_model": None,
            "status_code": self.success,
            **self.extra,
        }
