"""The run over many adapters judges answers rightly, and draws by Zipf."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from loadtests.many_adapters import Answers, Draw

SCORES = {"LOW": 0.25, "HIGH": 0.75}


@pytest.mark.parametrize(
    ("named", "scores", "fault"),
    [
        ("one", SCORES, ""),
        ("one", {"LOW": 0.250001, "HIGH": 0.749999}, ""),
        ("two", SCORES, "answered by two"),
        ("one", {"LOW": 0.35, "HIGH": 0.65}, "off by 0.1"),
        ("one", {"LOW": 1.0}, "labels"),
        (None, SCORES, "answered by None"),
    ],
)
def test_every_kind_of_wrong_answer_is_seen(
    named: str | None, scores: dict[str, float], fault: str
) -> None:
    answers = Answers()
    answers.take("one", "a text", "one", SCORES)
    assert not answers.wrong
    answers.take("one", "a text", named, scores)
    assert bool(answers.wrong) == bool(fault)
    assert fault in " ".join(answers.wrong)
    answers.take("one", "another text", "one", {"LOW": 0.9, "HIGH": 0.1})
    assert len(answers.wrong) == bool(fault), "other texts have other answers"


def test_names_are_drawn_by_their_weights() -> None:
    names = [str(number) for number in range(50)]
    draw = Draw(names, [1 / (place + 1) for place in range(50)], random.Random(3))
    drawn = Counter(draw.next()[0] for _ in range(20_000))
    total = sum(1 / (place + 1) for place in range(50))
    for place in (0, 1, 9):
        assert drawn[names[place]] / 20_000 == pytest.approx(1 / (place + 1) / total, rel=0.15)
