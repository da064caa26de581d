"""The admin call that shows the keys: what each may, what it has used, and on which days."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import Query, Request, Response

from server.edge.admit.key_file import ApiKey
from server.edge.admit.key_usage_file import DAYS_KEPT
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.registry_calls import ADMIN_STATUSES
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.schemas_admin import KeyAnswer, KeyDay, KeyLimits, KeyList
from server.edge.service import Service


class KeyReport:
    """The endpoint; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def list(
        self, request: Request, days: int = Query(default=1, ge=1, le=DAYS_KEPT)
    ) -> Response:
        """The keys, without the keys themselves: what each may and what it has used."""
        service = self.service
        stored = await service.slow_work.run(service.usage_days, "records")
        shown = sorted(stored.days)[-days:]
        return Json(
            KeyList(
                keys=[self._answer(one) for one in service.keys.named()],
                days=[
                    KeyDay(day=day, key=name, **row.usage_numbers())
                    for day in shown
                    for name, row in sorted(stored.days[day].items())
                ],
                fault=service.keys_fault,
            ).model_dump()
        )

    def _answer(self, key: ApiKey) -> KeyAnswer:
        used = self.service.key_usage.of(key.name)
        quotas = key.quotas
        return KeyAnswer(
            name=key.name,
            admin=key.admin,
            metrics=key.metrics,
            adapters=list(key.adapters),
            expires=_moment_of(key.expires),
            expired=key.is_expired(),
            limits=KeyLimits(
                requests_per_minute=quotas.requests_per_minute,
                requests_per_day=quotas.requests_per_day,
                tokens_per_minute=quotas.tokens_per_minute,
                tokens_per_day=quotas.tokens_per_day,
            ),
            used=KeyLimits(
                requests_per_minute=used.minute_requests,
                requests_per_day=used.day.requests,
                tokens_per_minute=used.minute_tokens,
                tokens_per_day=used.day_tokens,
            ),
            prompt_tokens=used.day.prompt_tokens,
            generated_tokens=used.day.generated_tokens,
            last_used=_moment_of(used.last_used),
        )


def key_routes(report: KeyReport) -> list[Endpoint]:
    """The route of this endpoint."""
    return [
        Endpoint("/admin/keys", report.list, ("GET",), "Admin", KeyList, statuses=ADMIN_STATUSES)
    ]


def _moment_of(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
