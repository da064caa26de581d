"""The admin calls about adapters: register, list, show, pin, remove and apply many, while it runs.
Those about the versions of a name and about aliases are beside this module.

Checking and storing take seconds and happen on threads of their own. A name is answered with the
new version from the moment its row is committed; requests admitted before finish on the old one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastapi import Depends, Query, Request, Response

from adapters.errors import AdapterError
from adapters.inspection.audit import audit
from adapters.inspection.proofs import prove, rank_of
from adapters.intake.file_names import CARD_FILE
from adapters.registry.aliases import AliasChange
from adapters.registry.naming import check_name
from adapters.registry.records import NameChange, WantedName
from server.edge.endpoints.adapter_answers import apply_answer
from server.edge.endpoints.aliases import AliasCalls, alias_routes
from server.edge.endpoints.allowed_sources import fetched, unpacked
from server.edge.endpoints.audited import note_alias, note_change
from server.edge.endpoints.body import read_json, sent_json
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.registration import REGISTER_BODY, Registration, registration_of
from server.edge.endpoints.registry_calls import ADAPTER_PATH, NamePath, RegistryCalls, admin_route
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas_admin import (
    AdapterAnswer,
    AdapterList,
    ApplyAnswer,
    ApplyRequest,
    AuditAnswer,
    PatchRequest,
    RegisterRequest,
)
from server.edge.endpoints.uploads import received
from server.edge.endpoints.versions import VersionCalls, version_routes
from server.edge.service import Service
from server.errors import Fault, Refusal
from server.messages import Preload, ReleaseQuarantine

PAGE_MAX: Final = 1000
APPLY_BODY: Any = Depends(sent_json(ApplyRequest))
PATCH_BODY: Any = Depends(sent_json(PatchRequest))


class Admin:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._calls = RegistryCalls(service)

    async def register(self, request: Request) -> Response:
        """Register an adapter: from a source (JSON), or from files or one archive (multipart)."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            async with received(request, self.service) as upload:
                registration = registration_of(upload)
                folder = await self._calls.in_thread(
                    lambda: unpacked(upload, self.service.settings), "registrations"
                )
                return await self._register(registration, folder, "upload")
        body = await read_json(request, RegisterRequest, any_type=True)
        registration = Registration(body.name, body.replace, body.pinned, body.preload, body.stage)
        async with fetched(body.source, self.service) as folder:
            return await self._register(registration, folder, body.source)

    async def list(
        self,
        request: Request,
        prefix: str = Query(default="", max_length=64),
        offset: int = Query(default=0, ge=0),
        limit: int = Query(default=100, ge=1, le=PAGE_MAX),
    ) -> Response:
        """List adapters by name."""
        records = self.service.names.listed(prefix=prefix)
        return Json(
            {
                "adapters": await self._calls.shown_all(records[offset : offset + limit]),
                "total": len(records),
                "offset": offset,
                "limit": limit,
            }
        )

    async def show(self, request: Request, name: str = NamePath) -> Response:
        """Show one adapter."""
        record = self.service.targets.record(name, "name")
        return Json(await self._calls.shown(record))

    async def audit(self, request: Request, name: str = NamePath) -> Response:
        """Compare what an adapter claims of itself with what its tensors prove."""
        record = self.service.targets.record(name, "name")
        found = await self._calls.in_thread(lambda: self._audit(record.version), "records")
        return Json(found)

    def _audit(self, version: str) -> dict[str, Any]:
        folder = self.service.registry.store.path(version)
        card = folder / CARD_FILE
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        report = audit(folder, None, text)
        told = report.to_json_dict()
        pairs = prove(folder)[1].pairs
        return AuditAnswer(
            method=None if report.tensors is None else report.tensors.method,
            parameters=0 if report.tensors is None else report.tensors.parameters,
            ranks={path: rank_of(pair) or 0 for path, pair in pairs.items()},
            findings=[{key: str(value) for key, value in one.items()} for one in told["findings"]],
            contradictions=told["contradictions"],
        ).model_dump()

    async def change(
        self, request: Request, body: PatchRequest = PATCH_BODY, name: str = NamePath
    ) -> Response:
        """Pin or unpin an adapter, or bring it to the device; any change lifts a quarantine."""
        asks_device = body.preload or body.pinned
        found = self.service.targets.served_record if asks_device else self.service.targets.record
        record = found(name, "name")
        pinned = body.pinned
        if pinned is not None:
            record = await self._calls.change(
                lambda: self.service.registry.update(name, pinned=pinned), "records"
            )
        set_to = {} if pinned is None else {"pinned": pinned}
        note_change(record.name, record.version, record.version, **set_to)
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        if asks_device:
            self.service.dispatcher.tell(Preload(record.version))
        return Json(await self._calls.shown(record))

    async def remove(self, request: Request, name: str = NamePath) -> Response:
        """Remove an adapter. Requests that were admitted finish."""
        removed = await self._calls.change(lambda: self.service.registry.remove(name), "records")
        note_change(name, removed.version, None)
        return Response(status_code=204)

    async def apply(self, request: Request, body: ApplyRequest = APPLY_BODY) -> Response:
        """Put names on staged versions and take others away: all of it, or nothing.

        Every fault of every adapter is in the answer; none of them is applied then.
        """
        names = [one.name for one in body.adapters]
        faults = [
            Fault("invalid_request", "The name is there twice.", found=name[:80], field="adapters")
            for name in sorted({one for one in names if [*names, *body.remove].count(one) > 1})
        ]
        if faults:
            raise Refusal(faults)
        work = partial(self._apply, body)
        if body.dry_run:
            changes, aliases = await self._calls.in_thread(work, "registrations")
        else:
            changes, aliases = await self._calls.change(work, "registrations")
        for one in changes if not body.dry_run else ():
            before = None if one.before is None else one.before.version
            note_change(one.name, before, None if one.change == "removed" else one.record.version)
            if one.change not in ("removed", "unchanged"):
                self.service.dispatcher.tell(ReleaseQuarantine(one.record.version))
                if one.record.pinned:
                    self.service.dispatcher.tell(Preload(one.record.version))
        for moved in aliases if not body.dry_run else ():
            if moved.change != "unchanged":
                note_alias(moved.alias, moved.before, moved.name)
        return Json(apply_answer(changes, aliases, dry_run=body.dry_run))

    def _apply(self, body: ApplyRequest) -> tuple[Sequence[NameChange], Sequence[AliasChange]]:
        """Check every version first, then change the names in one transaction; in a thread.

        Raises:
            Refusal: With every fault of every adapter.
        """
        service, wanted, faults = self.service, [], list[Fault]()
        for place, one in enumerate(body.adapters):
            try:
                self._calls.check_free_of_base(one.name)
                check_name(one.name)
                record = self._calls.staged(one.version)
            except AdapterError as error:
                faults += Refusal.of(error).faults_of(one.name, f"adapters.{place}")
            except Refusal as refusal:
                faults += refusal.faults_of(one.name, f"adapters.{place}")
            else:
                wanted.append(WantedName(one.name, record, one.source or "upload", one.pinned))
        for alias in body.aliases or ():
            try:
                self._calls.check_free_of_base(alias)
            except Refusal as refusal:
                faults += refusal.faults_of(alias, "aliases")
        known = service.registry.records()
        faults += [
            Fault("adapter_not_found", f"There is no adapter {name[:80]}.", field="remove")
            for name in body.remove
            if name not in known
        ]
        if faults:
            raise Refusal(faults)
        return service.registry.apply(
            wanted, body.remove, aliases=body.aliases, dry_run=body.dry_run
        )

    async def _stage(self, name: str, folder: Path, source: str) -> Response:
        staged = await self._calls.in_thread(
            lambda: self.service.registry.stage(
                folder,
                self.service.base.signature,
                check=self.service.base.check_head,
                settle=self.service.settle,
            ),
            "registrations",
        )
        record = dataclasses.replace(staged, name=name, source=source)
        return Json(await self._calls.shown(record))

    async def _register(self, registration: Registration, folder: Path, source: str) -> Response:
        self._calls.check_free_of_base(registration.name)
        if registration.stage:
            return await self._stage(registration.name, folder, source)
        known = self.service.names.records.get(registration.name)
        record, created = await self._calls.change(
            lambda: self.service.registry.register(
                registration.name,
                folder,
                self.service.base.signature,
                source=source,
                replace=registration.replace,
                pinned=registration.pinned,
                check=self.service.base.check_head,
                settle=self.service.settle,
            ),
            "registrations",
        )
        note_change(record.name, None if known is None else known.version, record.version)
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        if registration.preload or registration.pinned:
            self.service.dispatcher.tell(Preload(record.version))
        return Json(
            await self._calls.shown(record),
            201 if created else 200,
            headers={"Location": f"/admin/adapters/{record.name}"},
        )


def admin_routes(service: Service) -> list[Endpoint]:
    """The routes of the administration, but for keys."""
    admin = Admin(service)
    adapters = "/admin/adapters"
    return [
        admin_route(
            "POST",
            adapters,
            admin.register,
            AdapterAnswer,
            201,
            also=(200,),  # the same content under the same name again
            extra={"openapi_extra": REGISTER_BODY},
        ),
        admin_route("GET", adapters, admin.list, AdapterList),
        admin_route("GET", ADAPTER_PATH, admin.show, AdapterAnswer),
        admin_route("GET", f"{ADAPTER_PATH}/audit", admin.audit, AuditAnswer),
        *version_routes(VersionCalls(service)),
        *alias_routes(AliasCalls(service)),
        admin_route("PATCH", ADAPTER_PATH, admin.change, AdapterAnswer, body=PatchRequest),
        admin_route("DELETE", ADAPTER_PATH, admin.remove, None, 204),
        admin_route("POST", "/admin/apply", admin.apply, ApplyAnswer, body=ApplyRequest),
    ]
