"""How many rows a generate step may have so that it takes no longer than it should, and whose.

On a processor a step takes longer with every row, and each token of every client waits for the
whole step. With ``step_ms`` the rows are limited by what steps were measured to take, and what the
limit allows is shared between adapters alike: a flood on one of them makes the others wait for
steps of that length and not for steps as long as the flood can make them. What that costs is
throughput, since a step's fixed part is paid for fewer rows.

The rows of a step follow no model of its time: they shrink when a step took too long and grow while
steps at the limit are short, as congestion windows do, so whatever a row costs on this machine, at
this load and for these adapters is in them. A few rows a step always has: with fewer, nearly all of
its time would be its fixed part, and a goal that no step can reach would end all throughput.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from server.generation.sequences import ScheduledRows, Sequence

# The limit follows the root of how far a step was off, within these: one disturbed step, or one
# that compiled something, costs little.
_LEAST_CHANGE: Final = 0.7
_MOST_CHANGE: Final = 1.2
# On two cores of a processor a step of so many rows takes about twice as long as one of a single
# row, and has half of the throughput of long ones.
LEAST_ROWS: Final = 16
# A step with fewer of the rows that it might have had says nothing of the limit being too low.
_AT_LIMIT: Final = 0.75


class StepPace:
    """The rows of generate steps that are to take a given time. One thread uses it.

    Args:
        goal_s: Seconds that a step should take at most.
        most_rows: What a step may have in any case; if that is fewer than ``LEAST_ROWS``, no step
            is limited further.
        most_of_one: What it may have of one sequence.
    """

    def __init__(self, goal_s: float, most_rows: int, most_of_one: int) -> None:
        self._goal_s = goal_s
        self._most_of_one = most_of_one
        self._most = float(most_rows)
        self._limit = float(most_rows)
        self._steps = 0  # whose rows were chosen here
        # In the order of their latest steps, and so whose turn it is.
        self._turns: dict[str | None, int] = {}
        self._stepped: dict[str, int] = {}

    @property
    def bounded_steps(self) -> int:
        """Steps that would have had more rows."""
        return self._steps

    @property
    def rows(self) -> int:
        """Rows that the next step may have."""
        return int(self._limit)

    def took(self, rows: int, seconds: float) -> None:
        """Note what a step took."""
        off = (self._goal_s / max(seconds, 1e-6)) ** 0.5
        if off < 1.0 or rows >= _AT_LIMIT * self.rows:
            limit = self._limit * min(max(off, _LEAST_CHANGE), _MOST_CHANGE)
            self._limit = min(max(limit, float(LEAST_ROWS)), self._most)

    def parts(self, running: Iterable[Sequence]) -> list[ScheduledRows]:
        """Choose the rows of the next forward: at most ``rows``.

        They are shared between adapters alike: what one does not need is shared by the others.
        Among the sequences of one adapter, and among adapters where they are more than rows, those
        come first whose latest step is the longest ago. A prompt is read in pieces.

        Returns:
            Parts in the order of their rows; those of one slot are neighbours.
        """
        sequences = list(running)
        self._steps += 1
        here = {one.request.id for one in sequences}
        # Who is new stands behind everybody who was here: newcomers cannot hold up others for ever.
        self._stepped = {one: self._stepped.get(one, self._steps) for one in here}
        groups: dict[str | None, list[Sequence]] = {}
        for one in sequences:
            groups.setdefault(one.request.version, []).append(one)
        self._turns = {version: self._turns.get(version, self._steps) for version in groups}
        parts: list[ScheduledRows] = []
        for version, share in self._shares(groups).items():
            self._turns[version] = self._steps
            left = share
            for one in sorted(groups[version], key=lambda one: self._stepped[one.request.id]):
                rows = min(one.pending, self._most_of_one, left)
                if rows > 0:
                    parts.append(ScheduledRows(one, rows))
                    self._stepped[one.request.id] = self._steps
                    left -= rows
        # Fewer segments make fewer and larger products.
        return sorted(parts, key=lambda part: part.sequence.slot)

    def _shares(self, groups: dict[str | None, list[Sequence]]) -> dict[str | None, int]:
        """The rows of each adapter that gets some: equal, but for what one does not need."""
        left = self.rows
        wanted = {
            version: sum(min(one.pending, self._most_of_one) for one in own)
            for version, own in groups.items()
        }
        turn = sorted(groups, key=lambda version: self._turns[version])[:left]
        shares: dict[str | None, int] = {}
        for place, version in enumerate(sorted(turn, key=lambda version: wanted[version])):
            shares[version] = min(wanted[version], -(-left // (len(turn) - place)))
            left -= shares[version]
        return shares
