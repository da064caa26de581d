"""The measures of the comparison: accuracy and F1 of labels."""

from __future__ import annotations

from collections.abc import Sequence


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """The share of labels that are right."""
    return sum(a == b for a, b in zip(predicted, actual, strict=True)) / len(actual)


def f1(predicted: Sequence[int], actual: Sequence[int], label: int = 1) -> float:
    """2 hits / (predicted + actual) of one label; 0 where it is neither predicted nor actual."""
    pairs = list(zip(predicted, actual, strict=True))
    hits = sum(a == b == label for a, b in pairs)
    named = sum(a == label for a, _ in pairs) + sum(b == label for _, b in pairs)
    return 2 * hits / named if named else 0.0


def margin(share: float, rows: int) -> float:
    """Half the width of the 95 % interval of a share that was counted over some rows."""
    return 1.96 * float((share * (1 - share) / rows) ** 0.5)
