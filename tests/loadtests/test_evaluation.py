"""What the comparison with lm-evaluation-harness calls a difference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtests.evaluation import TOLERANCE_NATS, Scored, compared, differs

DIRECT = Scored(0.5, ((-4.0, -3.0), (-2.0, -5.0)), ((False, True), (False, False)), 1.0)
WITHIN = DIRECT.loglikelihoods[0][0] + TOLERANCE_NATS / 2


@pytest.mark.parametrize(
    ("served", "different"),
    [
        (replace(DIRECT, seconds=9.0), False),
        (replace(DIRECT, loglikelihoods=((WITHIN, -3.0), (-2.0, -5.0))), False),
        (replace(DIRECT, loglikelihoods=((-4.0, -3.001), (-2.0, -5.0))), True),
        (replace(DIRECT, loglikelihoods=((-3.0, -4.0), (-2.0, -5.0))), True),
        (replace(DIRECT, greedy=((True, True), (False, False))), True),
        (replace(DIRECT, accuracy=1.0), True),
    ],
)
def test_a_score_a_choice_or_a_figure_that_differs_is_told(served: Scored, different: bool) -> None:
    assert differs(compared(served, DIRECT)) is different
