"""Who makes the call that is being answered: known to everything below it without being handed on.

Set once for each call, before anything is asked of it, and seen by the tasks that belong to it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from server.edge.admit.key_file import ApiKey
from server.messages import Origin, trace_id_of

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class Caller:
    """One call, while it is answered.

    Args:
        request_id: Of the call.
        key: With which it was admitted; None where none is needed.
        adapter, version: Of the request that was admitted for it last; None for the bare base.
        traceparent: Of the span that its requests belong to.
        changes: What it did to names and aliases, as the audit log has it.
    """

    request_id: str
    key: ApiKey | None = None
    adapter: str | None = None
    version: str | None = None
    traceparent: str | None = None
    changes: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def origin(self) -> Origin:
        """What of it travels with a request."""
        key = None if self.key is None else self.key.name
        return Origin(self.request_id, key, self.traceparent)

    def log_fields(self) -> dict[str, str | None]:
        """What a line of a log has beside its text while the call is answered."""
        return {
            "request_id": self.request_id,
            "key": None if self.key is None else self.key.name,
            "adapter": self.adapter,
            "version": self.version,
            "trace_id": trace_id_of(self.traceparent),
        }


def request_id_of(given: str) -> str:
    """The id of a call: what its client gave, if that can be one, or else a new one."""
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def set_caller(caller: Caller | None) -> None:
    """From here on, for this task and those that it starts."""
    _CALLER.set(caller)


def current_caller() -> Caller | None:
    """None outside of any call."""
    return _CALLER.get()


def may_ask(adapter: str) -> bool:
    """Whether the present call may ask for an adapter of this name, be there one or not.

    What is no call of anybody's, such as the start of the server, may ask for all.
    """
    caller = _CALLER.get()
    return caller is None or caller.key is None or caller.key.may_ask(adapter)
