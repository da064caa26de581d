"""The admin calls about aliases: other names for adapters."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request, Response
from fastapi import Path as PathParameter

from server.edge.endpoints.audited import note_alias
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.registry_calls import RegistryCalls, admin_route
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas_admin import AliasAnswer, AliasList, AliasRequest
from server.edge.service import Service

ALIAS_BODY: Any = Depends(sent_json(AliasRequest))
AliasPath = PathParameter(max_length=128, description="The alias.")


class AliasCalls:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._calls = RegistryCalls(service)

    async def list_aliases(self, request: Request) -> Response:
        """List the aliases and what each points to."""
        found = await self._calls.in_thread(self.service.registry.aliases.all, "records")
        return Json(AliasList(aliases=found).model_dump())

    async def set_alias(
        self, request: Request, body: AliasRequest = ALIAS_BODY, alias: str = AliasPath
    ) -> Response:
        """Point an alias to an adapter, from wherever it points now."""
        self._calls.check_free_of_base(alias)
        record, before = await self._calls.change(
            lambda: self.service.registry.aliases.set(alias, body.adapter), "records"
        )
        note_alias(alias, before, record.name)
        answer = AliasAnswer(alias=alias, adapter=record.name, before=before)
        return Json(answer.model_dump())

    async def remove_alias(self, request: Request, alias: str = AliasPath) -> Response:
        """Remove an alias; the adapter stays."""
        pointed = await self._calls.change(
            lambda: self.service.registry.aliases.remove(alias), "records"
        )
        note_alias(alias, pointed, None)
        return Response(status_code=204)


def alias_routes(calls: AliasCalls) -> list[Endpoint]:
    """The routes of these endpoints."""
    one = "/admin/aliases/{alias}"
    return [
        admin_route("GET", "/admin/aliases", calls.list_aliases, AliasList),
        admin_route("PUT", one, calls.set_alias, AliasAnswer, body=AliasRequest),
        admin_route("DELETE", one, calls.remove_alias, None, 204),
    ]
