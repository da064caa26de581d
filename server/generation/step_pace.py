"""Which rows the next generate step has, where a busy adapter must not make all others slow.

On a processor a step takes longer with every row, and each token of every client waits for a whole
step: a flood on one adapter makes the tokens of all others slow. With ``token_ms``, adapters that
have little to run get steps of their own between those of everybody: a step of few rows is short,
so on average their tokens come as often as asked for, though some still wait for a long step. That
costs less throughput than to shorten all steps: what a step costs besides its rows is paid once
more for a short step, and not for every few rows of the flood.

A pace keeps account of time, not of rows: whatever a row costs on this machine, at this load and
for these adapters is in what steps were measured to take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Final

from server.generation.sequences import ScheduledRows, Sequence

ChooseRows = Callable[[list[Sequence]], list[ScheduledRows]]

# Light adapters have at most so much of the mean adapter's sequences, and of its rows in the step
# of everybody, and together at most so much of all rows: with more, a step of theirs would hardly
# be shorter than one of everybody.
_OF_THE_MEAN: Final = 1 / 2
_OF_ALL: Final = 1 / 4
# Seconds of light steps to each second of the steps of everybody, at most.
_MOST_LIGHT: Final = 1.0
# A step that was disturbed counts as this many of the latest one of everybody, or of the goal, at
# most.
_MOST_STEPS: Final = 2
_MOST_GOALS: Final = 8


class StepPace:
    """Whose rows the next step has: those of everybody, or of light adapters alone.

    One thread uses it: ``parts``, then ``took`` with what that step took.

    Args:
        goal_s: Seconds from token to token that light adapters should have on average.
        cut: Chooses the rows of a step of these sequences.
    """

    def __init__(self, goal_s: float, cut: ChooseRows) -> None:
        self._goal_s = goal_s
        self._cut = cut
        # By how much light adapters are behind the goal: the sum of what steps took, less the goal.
        self._behind_s = 0.0
        self._full_s = 0.0  # of the latest step of everybody
        self._light_s = 0.0  # of the light ones since then, and what those before had too much
        self._light = False  # whether the step under way is one
        self._steps = {"all": 0, "light": 0}

    @property
    def steps(self) -> Mapping[str, int]:
        """Steps so far, of everybody (``all``) and of light adapters alone (``light``)."""
        return dict(self._steps)

    def parts(self, running: list[Sequence]) -> list[ScheduledRows]:
        """The rows of the next forward."""
        every = self._cut(running)
        light = light_parts(every) if self._is_behind() else []
        self._light = bool(light)
        return light or every

    def took(self, seconds: float) -> None:
        """Note what the step took whose rows ``parts`` chose."""
        self._steps["light" if self._light else "all"] += 1
        seconds = min(seconds, max(_MOST_STEPS * self._full_s, _MOST_GOALS * self._goal_s))
        behind_s = max(self._behind_s + seconds - self._goal_s, -self._goal_s)
        if self._light:
            self._light_s += seconds
        else:
            # Nobody has waited for more than this step when what came before it is forgotten: who
            # comes during it is behind by no more, and nothing that was owed is owed for ever.
            behind_s = min(behind_s, seconds)
            self._light_s = max(0.0, self._light_s - _MOST_LIGHT * self._full_s)
            self._full_s = seconds
        self._behind_s = behind_s

    def _is_behind(self) -> bool:
        return self._behind_s > 0.0 and self._light_s < _MOST_LIGHT * self._full_s


def light_parts(parts: list[ScheduledRows]) -> list[ScheduledRows]:
    """Of a step of everybody, those of adapters with few rows where others have many; [] where
    there are none.

    Adapters that have equally many are light together or not at all.
    """
    rows: Counter[str | None] = Counter()
    sequences: Counter[str | None] = Counter()
    for part in parts:
        rows[part.sequence.request.version] += part.rows
        sequences[part.sequence.request.version] += 1
    most_rows = _OF_THE_MEAN * rows.total() / max(1, len(rows))
    most_sequences = _OF_THE_MEAN * len(parts) / max(1, len(rows))
    few = [v for v in rows if rows[v] <= most_rows and sequences[v] <= most_sequences]
    left = _OF_ALL * rows.total()
    light: set[str | None] = set()
    for each, alike in groupby(sorted(few, key=rows.__getitem__), key=rows.__getitem__):
        group = list(alike)
        left -= each * len(group)
        if left < 0:
            break
        light.update(group)
    return [part for part in parts if part.sequence.request.version in light]
