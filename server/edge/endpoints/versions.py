"""The admin calls about the versions of one name: its history, going back in it, and trying another
version on a share of its traffic (a canary)."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request, Response

from server.edge.endpoints.adapter_answers import versions_answer
from server.edge.endpoints.audited import note_change
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.registry_calls import ADAPTER_PATH, NamePath, RegistryCalls, admin_route
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas_admin import (
    AdapterAnswer,
    CanaryRequest,
    MoveAnswer,
    RollbackRequest,
    VersionsAnswer,
)
from server.edge.service import Service
from server.messages import Preload, ReleaseQuarantine

ROLLBACK_BODY: Any = Depends(sent_json(RollbackRequest))
CANARY_BODY: Any = Depends(sent_json(CanaryRequest))


class VersionCalls:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._calls = RegistryCalls(service)

    async def versions(self, request: Request, name: str = NamePath) -> Response:
        """The history of a name: each version that it was on, since when, and by what."""
        registry = self.service.registry
        found = await self._calls.in_thread(
            lambda: [
                (one, registry.store.has(one.version)) for one in registry.moves.history(name)
            ],
            "records",
        )
        return Json(versions_answer(name, registry.kept_versions, found))

    async def rollback(
        self, request: Request, body: RollbackRequest = ROLLBACK_BODY, name: str = NamePath
    ) -> Response:
        """Put a name back on a version that it was on; no later request is answered otherwise."""
        record, before = await self._calls.change(
            lambda: self.service.registry.moves.rollback(name, body.version, self._calls.staged),
            "records",
        )
        note_change(name, before.version, record.version)
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        self.service.dispatcher.tell(Preload(record.version))
        return Json({**await self._calls.shown(record), "before": before.version})

    async def start_canary(
        self, request: Request, body: CanaryRequest = CANARY_BODY, name: str = NamePath
    ) -> Response:
        """Give another version a share of a name's requests, or the canary another share."""
        record = await self._calls.change(
            lambda: self.service.registry.moves.start_canary(
                name, body.version, body.share, self._calls.staged
            ),
            "registrations",
        )
        assert record.canary is not None
        started = {"version": record.canary.record.version, "share": record.canary.share}
        note_change(name, record.version, record.version, canary=started)
        self.service.dispatcher.tell(ReleaseQuarantine(record.canary.record.version))
        self.service.dispatcher.tell(Preload(record.canary.record.version))
        return Json(await self._calls.shown(record))

    async def promote_canary(self, request: Request, name: str = NamePath) -> Response:
        """Put a name on its canary's version."""
        record, before = await self._calls.change(
            lambda: self.service.registry.moves.promote(name), "records"
        )
        note_change(name, before.version, record.version)
        return Json({**await self._calls.shown(record), "before": before.version})

    async def abort_canary(self, request: Request, name: str = NamePath) -> Response:
        """End a canary: the version that the name is on answers all requests."""
        record, _ = await self._calls.change(
            lambda: self.service.registry.moves.abort(name), "records"
        )
        note_change(name, record.version, record.version, canary=None)
        return Json(await self._calls.shown(record))


def version_routes(calls: VersionCalls) -> list[Endpoint]:
    """The routes of these endpoints."""
    canary = f"{ADAPTER_PATH}/canary"
    return [
        admin_route("GET", f"{ADAPTER_PATH}/versions", calls.versions, VersionsAnswer),
        admin_route(
            "POST", f"{ADAPTER_PATH}/rollback", calls.rollback, MoveAnswer, body=RollbackRequest
        ),
        admin_route("PUT", canary, calls.start_canary, AdapterAnswer, body=CanaryRequest),
        admin_route("POST", f"{canary}/promote", calls.promote_canary, MoveAnswer),
        admin_route("DELETE", canary, calls.abort_canary, AdapterAnswer),
    ]
