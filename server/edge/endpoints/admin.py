"""The admin calls: register, list, show, pin, roll back and remove adapters, name them otherwise
and try versions on a share of the traffic, while it runs.

Checking and storing take seconds and happen on threads of their own. A name is answered with the
new version from the moment its row is committed; requests admitted before finish on the old one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastapi import Depends, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel

from adapters.errors import AdapterError, full_disk_refused
from adapters.inspection.audit import audit
from adapters.inspection.proofs import prove, rank_of
from adapters.intake.file_names import CARD_FILE
from adapters.registry.aliases import AliasChange
from adapters.registry.naming import check_name
from adapters.registry.records import Canary, NameChange, WantedName
from adapters.registry.registry import AdapterRecord
from server.edge.admit.slow_work import Pool
from server.edge.endpoints.allowed_sources import fetched, unpacked
from server.edge.endpoints.audited import note_alias, note_change
from server.edge.endpoints.body import described_json, read_json, sent_json
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas import (
    AdapterAnswer,
    AdapterList,
    AliasAnswer,
    AliasChangeAnswer,
    AliasList,
    AliasRequest,
    ApplyAnswer,
    ApplyRequest,
    AuditAnswer,
    CanaryAnswer,
    CanaryRequest,
    MoveAnswer,
    NameChangeAnswer,
    PatchRequest,
    RegisterRequest,
    RollbackRequest,
    VersionAnswer,
    VersionsAnswer,
)
from server.edge.endpoints.uploads import Upload, received
from server.edge.service import Service
from server.errors import Fault, Refusal
from server.messages import Preload, ReleaseQuarantine
from server.metrics import BASE_LABEL, adapter_usage

logger = logging.getLogger(__name__)

PAGE_MAX: Final = 1000
ADMIN_STATUSES: Final = (400, 401, 403, 404, 408, 409, 410, 413, 422, 429, 431, 500, 503, 507)
TRUE: Final = frozenset({"true", "1", "yes", "on"})
FALSE: Final = frozenset({"false", "0", "no", "off", ""})
REGISTRATION_FLAGS: Final = ("replace", "pinned", "preload", "stage")
APPLY_BODY: Any = Depends(sent_json(ApplyRequest))
PATCH_BODY: Any = Depends(sent_json(PatchRequest))
ROLLBACK_BODY: Any = Depends(sent_json(RollbackRequest))
CANARY_BODY: Any = Depends(sent_json(CanaryRequest))
ALIAS_BODY: Any = Depends(sent_json(AliasRequest))
# By method and path below /admin: the bodies that their endpoints check by themselves.
DESCRIBED: Final[dict[tuple[str, str], type[BaseModel]]] = {
    ("PATCH", "/admin/adapters/{name}"): PatchRequest,
    ("POST", "/admin/apply"): ApplyRequest,
    ("POST", "/admin/adapters/{name}/rollback"): RollbackRequest,
    ("PUT", "/admin/adapters/{name}/canary"): CanaryRequest,
    ("PUT", "/admin/aliases/{alias}"): AliasRequest,
}
NamePath = PathParameter(max_length=128, description="The adapter's name.")
AliasPath = PathParameter(max_length=128, description="The alias.")


@dataclass(frozen=True, slots=True)
class Registration:
    """What a registration asks for, from JSON or from a form."""

    name: str
    replace: bool
    pinned: bool
    preload: bool
    stage: bool


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What others than the registry know of adapters at this moment."""

    residency: Mapping[str, str]  # tier by version
    quarantined: Mapping[str, tuple[float, str]]  # by version: until when, and why
    usage: Mapping[str, tuple[int, float | None]]  # by name: requests, time of the last


class Admin:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def register(self, request: Request) -> Response:
        """Register an adapter: from a source (JSON), or from files or one archive (multipart)."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            async with received(request, self.service) as upload:
                registration = _registration(upload)
                folder = await self._in_thread(
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
        known = await self._known()
        return Json(
            {
                "adapters": [self._answer(one, known) for one in records[offset : offset + limit]],
                "total": len(records),
                "offset": offset,
                "limit": limit,
            }
        )

    async def show(self, request: Request, name: str = NamePath) -> Response:
        """Show one adapter."""
        record = self.service.targets.record(name, "name")
        return Json(self._answer(record, await self._known()))

    async def audit(self, request: Request, name: str = NamePath) -> Response:
        """Compare what an adapter claims of itself with what its tensors prove."""
        record = self.service.targets.record(name, "name")
        found = await self._in_thread(lambda: self._audit(record.version), "records")
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
            record = await self._change(
                lambda: self.service.registry.update(name, pinned=pinned), "records"
            )
        set_to = {} if pinned is None else {"pinned": pinned}
        note_change(record.name, record.version, record.version, **set_to)
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        if asks_device:
            self.service.dispatcher.tell(Preload(record.version))
        return Json(self._answer(record, await self._known()))

    async def versions(self, request: Request, name: str = NamePath) -> Response:
        """The history of a name: each version that it was on, since when, and by what."""
        registry = self.service.registry
        found = await self._in_thread(
            lambda: [
                (one, registry.store.has(one.version)) for one in registry.moves.history(name)
            ],
            "records",
        )
        current = found[0][0].version if found else None
        answer = VersionsAnswer(
            name=name,
            kept_versions=registry.kept_versions,
            versions=[
                VersionAnswer(
                    number=one.number,
                    version=one.version,
                    act=one.act,
                    at=one.acted.isoformat(),
                    source=one.source,
                    bytes=one.tensor_bytes,
                    current=one.version == current,
                    kept=kept,
                    restores=one.restores,
                )
                for one, kept in found
            ],
        )
        return Json(answer.model_dump())

    async def rollback(
        self, request: Request, body: RollbackRequest = ROLLBACK_BODY, name: str = NamePath
    ) -> Response:
        """Put a name back on a version that it was on; no later request is answered otherwise."""
        record, before = await self._change(
            lambda: self.service.registry.moves.rollback(name, body.version, self._staged),
            "records",
        )
        note_change(name, before.version, record.version)
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        self.service.dispatcher.tell(Preload(record.version))
        return Json({**self._answer(record, await self._known()), "before": before.version})

    async def start_canary(
        self, request: Request, body: CanaryRequest = CANARY_BODY, name: str = NamePath
    ) -> Response:
        """Give another version a share of a name's requests, or the canary another share."""
        record = await self._change(
            lambda: self.service.registry.moves.start_canary(
                name, body.version, body.share, self._staged
            ),
            "registrations",
        )
        assert record.canary is not None
        started = {"version": record.canary.record.version, "share": record.canary.share}
        note_change(name, record.version, record.version, canary=started)
        self.service.dispatcher.tell(ReleaseQuarantine(record.canary.record.version))
        self.service.dispatcher.tell(Preload(record.canary.record.version))
        return Json(self._answer(record, await self._known()))

    async def promote_canary(self, request: Request, name: str = NamePath) -> Response:
        """Put a name on its canary's version."""
        record, before = await self._change(
            lambda: self.service.registry.moves.promote(name), "records"
        )
        note_change(name, before.version, record.version)
        return Json({**self._answer(record, await self._known()), "before": before.version})

    async def abort_canary(self, request: Request, name: str = NamePath) -> Response:
        """End a canary: the version that the name is on answers all requests."""
        record, _ = await self._change(lambda: self.service.registry.moves.abort(name), "records")
        note_change(name, record.version, record.version, canary=None)
        return Json(self._answer(record, await self._known()))

    async def list_aliases(self, request: Request) -> Response:
        """List the aliases and what each points to."""
        found = await self._in_thread(self.service.registry.aliases.all, "records")
        return Json(AliasList(aliases=found).model_dump())

    async def set_alias(
        self, request: Request, body: AliasRequest = ALIAS_BODY, alias: str = AliasPath
    ) -> Response:
        """Point an alias to an adapter, from wherever it points now."""
        self._check_free_of_base(alias)
        record, before = await self._change(
            lambda: self.service.registry.aliases.set(alias, body.adapter), "records"
        )
        note_alias(alias, before, record.name)
        answer = AliasAnswer(alias=alias, adapter=record.name, before=before)
        return Json(answer.model_dump())

    async def remove_alias(self, request: Request, alias: str = AliasPath) -> Response:
        """Remove an alias; the adapter stays."""
        pointed = await self._change(lambda: self.service.registry.aliases.remove(alias), "records")
        note_alias(alias, pointed, None)
        return Response(status_code=204)

    def _staged(self, version: str) -> AdapterRecord:
        """The record of a version whose bytes are in the store, checked on the base; in a thread.

        Raises:
            AdapterError: Whatever is wrong with them.
        """
        service = self.service
        return service.registry.staged(
            version,
            service.base.signature,
            check=service.base.check_head,
            settle=service.settle,
        )

    async def remove(self, request: Request, name: str = NamePath) -> Response:
        """Remove an adapter. Requests that were admitted finish."""
        removed = await self._change(lambda: self.service.registry.remove(name), "records")
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
            changes, aliases = await self._in_thread(work, "registrations")
        else:
            changes, aliases = await self._change(work, "registrations")
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
        return Json(
            ApplyAnswer(
                applied=not body.dry_run,
                changes=[
                    NameChangeAnswer(
                        name=one.name,
                        change=one.change,
                        version=one.record.version,
                        before=None if one.before is None else one.before.version,
                        pinned=one.record.pinned,
                    )
                    for one in changes
                ],
                aliases=[
                    AliasChangeAnswer.model_validate(
                        {
                            "alias": one.alias,
                            "change": one.change,
                            "adapter": one.name,
                            "before": one.before,
                        }
                    )
                    for one in aliases
                ],
            ).model_dump()
        )

    def _apply(self, body: ApplyRequest) -> tuple[Sequence[NameChange], Sequence[AliasChange]]:
        """Check every version first, then change the names in one transaction; in a thread.

        Raises:
            Refusal: With every fault of every adapter.
        """
        service, wanted, faults = self.service, [], list[Fault]()
        for place, one in enumerate(body.adapters):
            try:
                self._check_free_of_base(one.name)
                check_name(one.name)
                record = self._staged(one.version)
            except AdapterError as error:
                faults += Refusal.of(error).faults_of(one.name, f"adapters.{place}")
            except Refusal as refusal:
                faults += refusal.faults_of(one.name, f"adapters.{place}")
            else:
                wanted.append(WantedName(one.name, record, one.source or "upload", one.pinned))
        for alias in body.aliases or ():
            try:
                self._check_free_of_base(alias)
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

    def _check_free_of_base(self, name: str) -> None:
        if name in {BASE_LABEL, self.service.base.name}:
            raise Refusal.because(
                "invalid_name",
                "This name belongs to the base model.",
                found=name,
                expected="another name",
                field="name",
            )

    async def _stage(self, name: str, folder: Path, source: str) -> Response:
        staged = await self._in_thread(
            lambda: self.service.registry.stage(
                folder,
                self.service.base.signature,
                check=self.service.base.check_head,
                settle=self.service.settle,
            ),
            "registrations",
        )
        record = dataclasses.replace(staged, name=name, source=source)
        return Json(self._answer(record, await self._known()))

    async def _register(self, registration: Registration, folder: Path, source: str) -> Response:
        self._check_free_of_base(registration.name)
        if registration.stage:
            return await self._stage(registration.name, folder, source)
        known = self.service.names.records.get(registration.name)
        record, created = await self._change(
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
            self._answer(record, await self._known()),
            201 if created else 200,
            headers={"Location": f"/admin/adapters/{record.name}"},
        )

    async def _in_thread(self, work: Any, pool: Pool) -> Any:
        """Run something slow off the event loop, its errors as refusals."""
        with _refused():
            return await self.service.slow_work.run(work, pool)

    async def _change(self, work: Any, pool: Pool) -> Any:
        """Change the registry off the event loop, its errors as refusals."""
        with _refused():
            return await self.service.change_registry(work, pool)

    def _answer(self, record: AdapterRecord, known: AdapterStatus) -> dict[str, Any]:
        return _answer(record, known, self.service.names.base_digest)

    async def _known(self) -> AdapterStatus:
        state = self.service.dispatcher.state()
        snapshot = {} if state is None else state.snapshot
        residency, quarantined = snapshot.get("residency", {}), snapshot.get("quarantined", {})
        return AdapterStatus(
            residency, quarantined, await self.service.slow_work.run(adapter_usage, "metrics")
        )


@contextmanager
def _refused() -> Iterator[None]:
    """Turn errors of the registry and the disk into refusals."""
    try:
        with full_disk_refused("The disk"):
            yield
    except AdapterError as error:
        raise Refusal.of(error) from None


def _answer(record: AdapterRecord, known: AdapterStatus, base_digest: str) -> dict[str, Any]:
    requests, last_used = known.usage.get(record.name, (0, None))
    until, why = known.quarantined.get(record.version, (None, None))
    return AdapterAnswer(
        name=record.name,
        version=record.version,
        method=record.method,
        task=record.task,
        labels=None if record.labels is None else list(record.labels),
        ranks=list(record.ranks),
        targets=list(record.targets),
        parameters=record.parameters,
        bytes=record.tensor_bytes,
        sparsity=record.sparsity,
        base=record.base_name,
        source=record.source,
        pinned=record.pinned,
        served=record.fits(base_digest),
        created=record.created.isoformat(),
        residency=known.residency.get(record.version, "disk"),
        requests=requests,
        last_used=_when(last_used),
        quarantined_until=_when(until),
        quarantine_reason=why,
        chat_template=record.chat_template,
        generation=dict(record.generation),
        notes=list(record.notes),
        aliases=list(record.aliases),
        canary=None if record.canary is None else _canary_answer(record.canary, known, base_digest),
    ).model_dump()


def _canary_answer(canary: Canary, known: AdapterStatus, base_digest: str) -> CanaryAnswer:
    record = canary.record
    return CanaryAnswer(
        version=record.version,
        share=canary.share,
        started=record.created.isoformat(),
        source=record.source,
        served=record.fits(base_digest),
        residency=known.residency.get(record.version, "disk"),
        quarantined_until=_when(known.quarantined.get(record.version, (None, None))[0]),
    )


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _registration(upload: Upload) -> Registration:
    """The fields of a form.

    Raises:
        Refusal: invalid_request that names the field.
    """
    fields = dict(upload.fields)
    name = fields.pop("name", None)
    flags = {one: _parse_flag(one, fields.pop(one, "")) for one in REGISTRATION_FLAGS}
    faults = [
        Fault("invalid_request", "There is no such field.", field=unknown) for unknown in fields
    ]
    if name is None:
        faults.append(Fault("invalid_request", "Field required", field="name"))
    if not upload.files:
        faults.append(
            Fault(
                "invalid_request",
                "The upload holds no file.",
                expected="adapter_config.json and adapter_model.safetensors, or one archive",
                field="files",
            )
        )
    if faults:
        raise Refusal(faults)
    assert name is not None
    return Registration(name, **flags)


def _parse_flag(name: str, text: str) -> bool:
    if text.lower() not in TRUE | FALSE:
        raise Refusal.because(
            "invalid_request", "Not a yes or no.", found=text[:40], expected="true or false",
            field=name,
        )  # fmt: skip
    return text.lower() in TRUE


def admin_routes(admin: Admin) -> list[Endpoint]:
    """The routes of these endpoints."""

    def route(method: str, path: str, endpoint: Any, answer: Any, success: int = 200) -> Endpoint:
        extra = {"openapi_extra": REGISTER_BODY} if success == 201 else {}
        if (method, path) in DESCRIBED:
            extra = described_json(DESCRIBED[method, path])
        return Endpoint(
            path,
            endpoint,
            (method,),
            "Admin",
            answer,
            statuses=ADMIN_STATUSES,
            success=success,
            also=(200,) if success == 201 else (),  # the same content under the same name again
            extra=extra,
        )

    one = "/admin/adapters/{name}"
    return [
        route("POST", "/admin/adapters", admin.register, AdapterAnswer, 201),
        route("GET", "/admin/adapters", admin.list, AdapterList),
        route("GET", one, admin.show, AdapterAnswer),
        route("GET", f"{one}/audit", admin.audit, AuditAnswer),
        route("GET", f"{one}/versions", admin.versions, VersionsAnswer),
        route("POST", f"{one}/rollback", admin.rollback, MoveAnswer),
        route("PUT", f"{one}/canary", admin.start_canary, AdapterAnswer),
        route("POST", f"{one}/canary/promote", admin.promote_canary, MoveAnswer),
        route("DELETE", f"{one}/canary", admin.abort_canary, AdapterAnswer),
        route("GET", "/admin/aliases", admin.list_aliases, AliasList),
        route("PUT", "/admin/aliases/{alias}", admin.set_alias, AliasAnswer),
        route("DELETE", "/admin/aliases/{alias}", admin.remove_alias, None, 204),
        route("PATCH", one, admin.change, AdapterAnswer),
        route("DELETE", one, admin.remove, None, 204),
        route("POST", "/admin/apply", admin.apply, ApplyAnswer),
    ]


REGISTER_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": RegisterRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "properties": {
                        "name": {"type": "string"},
                        "replace": {"type": "boolean"},
                        "pinned": {"type": "boolean"},
                        "preload": {"type": "boolean"},
                        "stage": {"type": "boolean"},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "The adapter's files, or one .zip or .tar archive; "
                            "1_Pooling/config.json under a file name with its folder",
                        },
                    },
                }
            },
        },
    }
}
