"""Parameters of the query: what is known passes, and nothing is left out in silence."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import Request
from fastapi.routing import APIRoute

from server.edge.endpoints.queries import SHOWN_MAX, check_query
from server.errors import Fault, Refusal


async def named(adapter: str | None = None) -> None:
    """An endpoint that takes an adapter's name."""


async def nothing() -> None:
    """One that takes no query."""


def check(path: str, query: str, *, takes_name: bool = True) -> tuple[Fault, ...]:
    route = APIRoute(path, named if takes_name else nothing)
    scope = {"type": "http", "path": path, "query_string": query.encode(), "route": route}
    try:
        asyncio.run(check_query(Request(scope)))
    except Refusal as refusal:
        return tuple(refusal.faults)
    return ()


@pytest.mark.parametrize("query", ["", "adapter=a", "adapter=a&adapter=b", "adapter="])
@pytest.mark.parametrize("path", ["/predict", "/v1/completions"])
def test_what_is_known_passes(path: str, query: str) -> None:
    assert check(path, query, takes_name=not path.startswith("/v1")) == ()


@pytest.mark.parametrize("path", ["/predict", "/v1/completions"])
@pytest.mark.parametrize("name", ["adaptor", "adapters", "Adapter", "adaper", "adapter_"])
def test_a_misspelt_name_is_told_what_was_meant(path: str, name: str) -> None:
    (fault,) = check(path, f"adapter=a&{name}=b", takes_name=path == "/predict")
    assert (fault.code, fault.field) == ("invalid_request", name)
    assert fault.fix == "Did you mean adapter?"


def test_what_nobody_knows_is_refused_but_under_v1() -> None:
    assert [one.field for one in check("/predict", "color=red&size=1")] == ["color", "size"]
    assert [one.field for one in check("/info", "x=1", takes_name=False)] == ["x"]
    assert check("/v1/completions", "api-version=2024-02-01", takes_name=False) == ()


def test_of_very_many_a_few_are_told() -> None:
    query = "&".join(f"{'n' * 200}{at}=1" for at in range(50))
    faults = check("/predict", query)
    assert len(faults) == SHOWN_MAX
    assert all(len(one.field or "") <= 80 for one in faults)
