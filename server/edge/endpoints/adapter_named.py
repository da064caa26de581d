"""What names an adapter in the query of a call."""

from __future__ import annotations

from typing import Any, Final

from fastapi import Query, Request

Named: Final[Any] = Query(default=None, max_length=256, description="The adapter's name.")


def adapter_names(request: Request, adapter: str | None) -> tuple[str | None, ...]:
    """Every ``adapter`` of the query: FastAPI alone would take the last and drop the others."""
    return (adapter, *request.query_params.getlist("adapter"))
