"""Parameters of the query that no endpoint knows.

One that is misspelt would be left out in silence, and its call answered as if it were not there:
``?adaptor=`` by the bare base.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from fastapi import Request
from fastapi.routing import APIRoute

from server.edge.endpoints.middleware import is_openai
from server.errors import Fault, Refusal

SHOWN_MAX: Final = 10
NAME_MAX: Final = 80  # characters of a name that are looked at
CLOSE: Final = 0.7  # as difflib measures how alike two names are: adaptor, adapters, adaper


async def check_query(request: Request) -> None:
    """Refuse parameters of the query that the endpoint does not know.

    Under /v1, where what nobody knows is ignored, only those that look like ``adapter``.

    Raises:
        Refusal: invalid_request, that names each and what may have been meant.
    """
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute):
        return
    openai = is_openai(request.scope)
    known = [one.alias for one in route.dependant.query_params] or ["adapter"] * openai
    faults = []
    for name in dict.fromkeys(request.query_params.keys()):
        if name in known:
            continue
        close = get_close_matches(name[:NAME_MAX].lower(), known, n=1, cutoff=CLOSE)
        if close or not openai:
            faults.append(_unknown(name[:NAME_MAX], known, close))
    if faults:
        raise Refusal(faults[:SHOWN_MAX])


def _unknown(name: str, known: list[str], close: list[str]) -> Fault:
    return Fault(
        "invalid_request",
        "There is no such parameter in the query.",
        found=f"?{name}=",
        expected=", ".join(f"?{one}=" for one in known) or "no query",
        fix=f"Did you mean {close[0]}?" if close else "Leave it out, or see /docs.",
        field=name,
    )
