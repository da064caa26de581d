"""Has a call of the administration written down before it is done, and its end before its answer.

A call that cannot be written down is refused, with one exception: what takes an adapter away makes
room on a disk that is full, and goes on. Then the server's log has what the audit log should have,
and the answer says so.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import Scope

from server.edge.admit.audit_log import AuditLog, audit_time
from server.edge.admit.callers import Caller, current_caller
from server.edge.admit.slow_work import SlowWork
from server.errors import Refusal

AUDITED_PATHS: Final = "/admin"
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
INCOMPLETE_HEADER: Final = (b"x-audit", b"incomplete")
CLAIM_CHARACTERS: Final = 200  # of what a client says of itself

logger = logging.getLogger(__name__)


class AuditedCall:
    """One call.

    Args:
        log: Where it is written down.
        slow_work: Has threads for that.
        scope: Of the call, as ASGI has it.
        caller: Who makes it.
    """

    def __init__(self, log: AuditLog, slow_work: SlowWork, scope: Scope, caller: Caller) -> None:
        self._log = log
        self._slow_work = slow_work
        self._began = time.monotonic()
        self._caller = caller
        self._may_go_on = scope["method"] == "DELETE"
        self.ended = False
        self.incomplete = False
        client = scope.get("client")
        claimed = Headers(scope=scope).get("x-forwarded-for", "")[:CLAIM_CHARACTERS]
        self._row: dict[str, Any] = {
            "request_id": caller.request_id,
            "key": None if caller.key is None else caller.key.name,
            "method": scope["method"],
            "path": scope["path"].encode("unicode_escape").decode()[:CLAIM_CHARACTERS],
            "client": client[0] if client else None,
            # Anybody may write this; it is worth what the proxy before the server is.
            **({"forwarded_for": claimed} if claimed else {}),
        }

    async def begin(self) -> None:
        """Write down that it begins.

        Raises:
            Refusal: audit_unwritable; then it must not be done. Or as `SlowWork.run`.
        """
        try:
            await self._write({"time": audit_time(), "event": "began", **self._row})
        except OSError as error:
            if self._may_go_on:
                self._tell({"event": "began", **self._row}, error)
                return
            raise Refusal.because(
                "audit_unwritable",
                "The call cannot be written to the audit log, so it was not made.",
                found=error.strerror,
                expected="room on the disk of the audit log",
                fix="Make room, or remove adapters, which goes on; audit_log says where it is.",
            ) from None

    async def end(self, status: int, code: str | None) -> None:
        """Write down how it ended; once.

        Args:
            status: Of the answer.
            code: Of the error, if it is one.
        """
        if self.ended:
            return
        self.ended = True
        row = {
            "time": audit_time(),
            "event": "ended",
            **self._row,
            "status": status,
            **({"code": code} if code else {}),
            "changes": self._caller.changes,
            "seconds": round(time.monotonic() - self._began, 3),
        }
        try:
            await self._write(row)
        except (OSError, Refusal) as error:
            self._tell(row, error)

    async def _write(self, row: dict[str, Any]) -> None:
        await self._slow_work.run(lambda: self._log.write(row), "audit", owed=True)

    def _tell(self, row: dict[str, Any], error: Exception) -> None:
        self.incomplete = True
        logger.error("Not in the audit log (%s): %s", error, json.dumps(row))


def note_change(name: str, before: str | None, after: str | None, **more: Any) -> None:
    """Say what the present call did to a name, for the audit log.

    Args:
        name: Of the adapter.
        before, after: The versions that it was on and is on; None: there was, or is, none.
        more: What else it did to it.
    """
    _note({"name": name, "before": before, "after": after, **more})


def note_alias(alias: str, before: str | None, after: str | None) -> None:
    """Say to which names the present call found and left an alias pointing, for the audit log."""
    _note({"alias": alias, "before": before, "after": after})


def _note(change: Mapping[str, Any]) -> None:
    caller = current_caller()
    if caller is not None:
        caller.changes.append(change)


def is_audited(scope: Scope) -> bool:
    """Whether a call may change something of the administration."""
    return str(scope["path"]).startswith(AUDITED_PATHS) and scope["method"] not in READING
