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

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Final

from server.generation.sequences import ScheduledRows, Sequence

Cut = Callable[[list[Sequence]], list[ScheduledRows]]

# Light adapters want at most so much of the mean adapter's rows, and of all rows together: with
# more, a step of theirs would hardly be shorter than one of everybody.
_OF_THE_MEAN: Final = 1 / 2
_OF_ALL: Final = 1 / 4
# Seconds of light steps to each second of the steps of everybody, at most.
_MOST_LIGHT: Final = 1.0


class StepPace:
    """Whose rows the next step has: those of everybody, or of light adapters alone.

    One thread uses it: ``parts``, then ``took`` with what that step took.

    Args:
        goal_s: Seconds from token to token that light adapters should have on average.
        cut: Chooses the rows of a step of these sequences.
    """

    def __init__(self, goal_s: float, cut: Cut) -> None:
        self._goal_s = goal_s
        self._cut = cut
        # By how much light adapters are behind the goal: the sum of what steps took, less the goal.
        self._behind_s = 0.0
        self._full_s = 0.0  # of the latest step of everybody
        self._light_s = 0.0  # of the light ones since then
        self._light = False  # whether the step under way is one
        self._steps = {"all": 0, "light": 0}

    @property
    def steps(self) -> Mapping[str, int]:
        """Steps so far, of everybody (``all``) and of light adapters alone (``light``)."""
        return dict(self._steps)

    def parts(self, running: list[Sequence]) -> list[ScheduledRows]:
        """The rows of the next forward."""
        light = light_ones(running) if self._is_behind() else []
        self._light = bool(light)
        return self._cut(light or running)

    def took(self, seconds: float) -> None:
        """Note what the step took whose rows ``parts`` chose."""
        self._steps["light" if self._light else "all"] += 1
        behind_s = max(self._behind_s + seconds - self._goal_s, -self._goal_s)
        if self._light:
            self._light_s += seconds
        else:
            # Nobody has waited for more than this step when what came before it is forgotten: who
            # comes during it is behind by no more, and nothing that was owed is owed for ever.
            behind_s = min(behind_s, seconds)
            self._full_s, self._light_s = seconds, 0.0
        self._behind_s = behind_s

    def _is_behind(self) -> bool:
        return self._behind_s > 0.0 and self._light_s < _MOST_LIGHT * self._full_s


def light_ones(running: list[Sequence]) -> list[Sequence]:
    """Sequences of the adapters that want few rows where others want many; [] where none do.

    Adapters that want equally many are light together or not at all.
    """
    wanted: dict[str | None, int] = {}
    for one in running:
        version = one.request.version
        wanted[version] = wanted.get(version, 0) + one.pending
    every = sum(wanted.values())
    if not every:
        return []
    most_of_one, left = _OF_THE_MEAN * every / len(wanted), _OF_ALL * every
    light: set[str | None] = set()
    for rows, alike in groupby(sorted(wanted, key=wanted.__getitem__), key=wanted.__getitem__):
        group = list(alike)
        left -= rows * len(group)
        if rows > most_of_one or left < 0:
            break
        light.update(group)
    return [one for one in running if one.request.version in light]
