"""What the tests of the lane that generates ask for and look at."""

from __future__ import annotations

from tests.stand.dense import Stage

VERSIONS: list[str | None] = [None, "a", "b", "c"]


def nothing_is_held(stage: Stage) -> bool:
    figures = stage.lane.figures()
    return (
        (figures.running, figures.waiting, figures.kv_blocks_used) == (0, 0, 0)
        and not +stage.residency.leases
        and stage.lane.next_deadline() is None
    )
