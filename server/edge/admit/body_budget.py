"""Memory for the bodies of requests: what one HTTP process holds of them at a time.

A body counts with its stated length before any of it is read, or as it comes where it has none, and
until its request is answered: until then its text, or what was made of it, is in memory.
"""

from __future__ import annotations

from server.edge.admit.admission import Admission


class BodyBudget:
    """Bytes of all bodies that are held. One event loop, no locks."""

    def __init__(self) -> None:
        self.held_bytes = 0

    def hold(self) -> HeldBody:
        """A body of which nothing is held yet."""
        return HeldBody(self)


class HeldBody:
    """The bytes of one request's body."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._bytes = 0

    def grow(self, size_bytes: int, most_bytes: int, admission: Admission) -> None:
        """Hold ``size_bytes`` in all, if they are not held already.

        Args:
            size_bytes: Of this body, stated or so far.
            most_bytes: Of all bodies; one that is alone may have more.
            admission: Says when to come back.

        Raises:
            Refusal: overloaded, with Retry-After; what was held before still is.
        """
        more = size_bytes - self._bytes
        if more <= 0:
            return
        held = self._budget.held_bytes
        if held + more > most_bytes and held > self._bytes:
            raise admission.overloaded(
                f"{held} bytes of bodies, and {more} more to come",
                f"at most {most_bytes} bytes of bodies in one HTTP process",
            )
        self._budget.held_bytes += more
        self._bytes = size_bytes

    def release(self) -> None:
        self._budget.held_bytes -= self._bytes
        self._bytes = 0
