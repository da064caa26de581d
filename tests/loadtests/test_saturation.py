"""What a level of load must not show."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.saturation import level_faults


def row(goodput: float, sent: float, best: float = 14.0) -> dict[str, Any]:
    return {
        "level": 2.0,
        "goodput_per_s": goodput,
        "offered_per_s": sent,
        "goodput_of_best": goodput / best,
        "accepted_s": {"p99": 1.0},
        "statuses": {"200": 100, "429 overloaded": 3},
        "unanswered": 0,
        "retry_after_s": {},
        "resident_peak": {},
    }


@pytest.mark.parametrize(
    ("goodput", "sent", "faulty"),
    [
        (13.0, 28.0, False),
        (11.7, 28.0, True),
        (11.7, 11.9, False),
        (9.0, 11.9, True),
        (0.0, 0.0, False),
    ],
)
def test_goodput_is_held_against_the_best_or_against_all_that_was_sent(
    goodput: float, sent: float, faulty: bool
) -> None:
    found = level_faults(row(goodput, sent), {}, 10.0)
    assert [fault.split(" is ")[0] for fault in found] == ["2x: goodput"] * faulty
