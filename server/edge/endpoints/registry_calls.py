"""What the endpoints of the administration share: the registry off the event loop, its errors as
refusals, adapters as they are shown, and the rows of their routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from fastapi import Path as PathParameter
from pydantic import BaseModel

from adapters.errors import AdapterError, StoreUnavailable, full_disk_refused
from adapters.registry.records import AdapterRecord
from server.edge.admit.slow_work import Pool
from server.edge.endpoints.adapter_answers import AdapterStatus, adapter_answer
from server.edge.endpoints.body import described_json
from server.edge.endpoints.routes import Endpoint
from server.edge.service import Service
from server.errors import Refusal
from server.metrics import BASE_LABEL, adapter_usage

ADMIN_STATUSES: Final = (400, 401, 403, 404, 408, 409, 410, 413, 422, 429, 431, 500, 503, 507)
ADAPTER_PATH: Final = "/admin/adapters/{name}"
NamePath = PathParameter(max_length=128, description="The adapter's name.")


class RegistryCalls:
    """Part of each object with endpoints of the administration."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def in_thread(self, work: Any, pool: Pool) -> Any:
        """Run something slow off the event loop, its errors as refusals."""
        with _refused():
            return await self.service.slow_work.run(work, pool)

    async def change(self, work: Any, pool: Pool) -> Any:
        """Change the registry off the event loop, its errors as refusals."""
        with _refused():
            return await self.service.change_registry(work, pool)

    def staged(self, version: str) -> AdapterRecord:
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

    def check_free_of_base(self, name: str) -> None:
        """Raise a Refusal where a name belongs to the base."""
        if name in {BASE_LABEL, self.service.base.name}:
            raise Refusal.because(
                "invalid_name",
                "This name belongs to the base model.",
                found=name,
                expected="another name",
                field="name",
            )

    async def shown(self, record: AdapterRecord) -> dict[str, Any]:
        """An adapter as it is answered."""
        return (await self.shown_all([record]))[0]

    async def shown_all(self, records: Sequence[AdapterRecord]) -> list[dict[str, Any]]:
        """Adapters as they are answered, all as of one moment.

        The store is asked of those alone that the engine does not have. While it is away they are
        shown as on disk: nothing says that they are lost, and what is committed is answered.
        """
        state = self.service.dispatcher.state()
        snapshot = {} if state is None else state.snapshot
        residency, quarantined = snapshot.get("residency", {}), snapshot.get("quarantined", {})
        digest = self.service.names.base_digest
        shown = {version for one in records for version in one.versions()}
        lost = await self._lost({one for one in shown if not residency.get(one)})

        def answers() -> list[dict[str, Any]]:
            known = AdapterStatus(residency, lost, quarantined, adapter_usage())
            return [adapter_answer(one, known, digest) for one in records]

        # A page of a thousand takes longer than the event loop has.
        return await self.service.slow_work.run(answers, "metrics")

    async def _lost(self, versions: set[str]) -> set[str]:
        """Those of ``versions`` whose bytes the store does not have; none while it is away."""
        if not versions:
            return set()
        store = self.service.registry.store
        try:
            return await self.service.slow_work.run(lambda: store.missing(versions), "records")
        except StoreUnavailable:
            return set()


@contextmanager
def _refused() -> Iterator[None]:
    """Turn errors of the registry and the disk into refusals."""
    try:
        with full_disk_refused("The disk"):
            yield
    except AdapterError as error:
        raise Refusal.of(error) from None


def admin_route(
    method: str,
    path: str,
    endpoint: Any,
    answer: Any,
    success: int = 200,
    *,
    body: type[BaseModel] | None = None,
    also: tuple[int, ...] = (),
    extra: dict[str, Any] | None = None,
) -> Endpoint:
    """The row of one route.

    Args:
        method, path, endpoint, answer, success, also, extra: As `Endpoint` has them.
        body: What the endpoint checks by itself, for the OpenAPI document.
    """
    return Endpoint(
        path,
        endpoint,
        (method,),
        "Admin",
        answer,
        statuses=ADMIN_STATUSES,
        success=success,
        also=also,
        extra=(extra or {}) if body is None else described_json(body),
    )
