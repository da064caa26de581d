"""The admin calls: register, list, show, pin and remove adapters while traffic runs.

Checking and storing take seconds and happen on threads of their own. A name is answered with the
new version from the moment its row is committed; requests admitted before finish on the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fastapi import Depends, Query, Request, Response
from fastapi import Path as PathParameter

from adapters.errors import AdapterError, full_disk_refused
from adapters.registry.registry import AdapterRecord
from server.edge.endpoints.allowed_sources import fetched, unpacked
from server.edge.endpoints.body import described_json, read_json, sent_json
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas import AdapterAnswer, AdapterList, PatchRequest, RegisterRequest
from server.edge.endpoints.uploads import Upload, received
from server.edge.service import Pool, Service
from server.errors import Fault, Refusal
from server.messages import Preload, ReleaseQuarantine
from server.metrics import BASE_LABEL, adapter_usage

logger = logging.getLogger(__name__)

PAGE_MAX: Final = 1000
ADMIN_STATUSES: Final = (401, 403, 404, 408, 409, 413, 422, 429, 431, 500, 503, 507)
TRUE: Final = frozenset({"true", "1", "yes", "on"})
FALSE: Final = frozenset({"false", "0", "no", "off", ""})
PATCH_BODY: Any = Depends(sent_json(PatchRequest))
NamePath = PathParameter(max_length=128, description="The adapter's name.")


@dataclass(frozen=True, slots=True)
class Registration:
    """What a registration asks for, from JSON or from a form."""

    name: str
    replace: bool
    pinned: bool
    preload: bool


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
        registration = Registration(body.name, body.replace, body.pinned, body.preload)
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
        record = self.service.record(name, "name")
        return Json(self._answer(record, await self._known()))

    async def change(
        self, request: Request, body: PatchRequest = PATCH_BODY, name: str = NamePath
    ) -> Response:
        """Pin or unpin an adapter, or bring it to the device; any change lifts a quarantine."""
        asks_device = body.preload or body.pinned
        found = self.service.served_record if asks_device else self.service.record
        record = found(name, "name")
        pinned = body.pinned
        if pinned is not None:
            record = await self._change(
                lambda: self.service.registry.update(name, pinned=pinned), "records"
            )
        self.service.dispatcher.tell(ReleaseQuarantine(record.version))
        if asks_device:
            self.service.dispatcher.tell(Preload(record.version))
        return Json(self._answer(record, await self._known()))

    async def remove(self, request: Request, name: str = NamePath) -> Response:
        """Remove an adapter. Requests that were admitted finish."""
        await self._change(lambda: self.service.registry.remove(name), "records")
        return Response(status_code=204)

    async def _register(self, registration: Registration, folder: Path, source: str) -> Response:
        if registration.name in {BASE_LABEL, self.service.base.name}:
            raise Refusal.because(
                "invalid_name",
                "This name belongs to the base model.",
                found=registration.name,
                expected="another name",
                field="name",
            )
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
            return await self.service.in_thread(work, pool)

    async def _change(self, work: Any, pool: Pool) -> Any:
        """Change the registry off the event loop, its errors as refusals."""
        with _refused():
            return await self.service.change_registry(work, pool)

    def _answer(self, record: AdapterRecord, known: AdapterStatus) -> dict[str, Any]:
        return _answer(record, known, served=record.fits(self.service.names.base_digest))

    async def _known(self) -> AdapterStatus:
        state = self.service.dispatcher.state()
        snapshot = {} if state is None else state.snapshot
        residency, quarantined = snapshot.get("residency", {}), snapshot.get("quarantined", {})
        return AdapterStatus(
            residency, quarantined, await self.service.in_thread(adapter_usage, "metrics")
        )


@contextmanager
def _refused() -> Iterator[None]:
    """Turn errors of the registry and the disk into refusals."""
    try:
        with full_disk_refused("The disk"):
            yield
    except AdapterError as error:
        raise Refusal.of(error) from None


def _answer(record: AdapterRecord, known: AdapterStatus, *, served: bool) -> dict[str, Any]:
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
        served=served,
        created=record.created.isoformat(),
        residency=known.residency.get(record.version, "disk"),
        requests=requests,
        last_used=_when(last_used),
        quarantined_until=_when(until),
        quarantine_reason=why,
        chat_template=record.chat_template,
        generation=dict(record.generation),
        notes=list(record.notes),
    ).model_dump()


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _registration(upload: Upload) -> Registration:
    """The fields of a form.

    Raises:
        Refusal: invalid_request that names the field.
    """
    fields = dict(upload.fields)
    name = fields.pop("name", None)
    flags = {one: _parse_flag(one, fields.pop(one, "")) for one in ("replace", "pinned", "preload")}
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
        if method == "PATCH":
            extra = described_json(PatchRequest)
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
        route("PATCH", one, admin.change, AdapterAnswer),
        route("DELETE", one, admin.remove, None, 204),
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
