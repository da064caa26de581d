"""Why a server cannot be started, as one error or several together."""

from __future__ import annotations

from typing import Self

from adapters.errors import ExplainedError


class StartFailed(ExplainedError):
    """The server cannot be started; the text is one line for the operator.

    Several faults that were found together are one error: ``faults`` has them, itself first.
    """

    code = "start_failed"

    others: tuple[StartFailed, ...] = ()

    @property
    def faults(self) -> tuple[StartFailed, ...]:
        """This fault and those that were found with it."""
        return (self, *self.others)

    @classmethod
    def of(cls, error: ExplainedError, about: str = "") -> Self:
        """What another error says, in one line each; ``about`` stands before its message."""

        def line(text: str | None) -> str | None:
            return None if text is None else " ".join(text.split())

        return cls(
            about + " ".join(error.message.split()),
            found=line(error.found),
            expected=line(error.expected),
            fix=line(error.fix),
        )
