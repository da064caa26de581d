"""Who makes the call that is being answered: known to everything below it without being handed on.

Set once for each call, before anything is asked of it, and seen by the tasks that belong to it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from server.edge.admit.key_file import ApiKey
from server.messages import Origin


@dataclass(slots=True)
class Caller:
    """Args:
    request_id: Of the call.
    key: With which it was admitted; None where none is needed.
    """

    request_id: str
    key: ApiKey | None = None

    @property
    def origin(self) -> Origin:
        """What of it travels with a request."""
        return Origin(self.request_id, None if self.key is None else self.key.name)


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def set_caller(caller: Caller) -> None:
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
