"""The measures of the recipe: accuracy and macro F1 of labels, perplexity of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """Return the share of labels that are right."""
    return sum(a == b for a, b in zip(predicted, actual, strict=True)) / len(actual)


def macro_f1(predicted: Sequence[int], actual: Sequence[int], labels: int) -> float:
    """Return the mean over labels of 2 hits / (predicted + actual); 0 where a label is neither."""
    pairs = list(zip(predicted, actual, strict=True))
    total = 0.0
    for label in range(labels):
        hits = sum(a == b == label for a, b in pairs)
        named = sum(a == label for a, _ in pairs) + sum(b == label for _, b in pairs)
        total += 2 * hits / named if named else 0.0
    return total / labels


def perplexity(nats: float, tokens: int) -> float:
    """Return exp of the mean negative log-likelihood, in nats a token."""
    return math.exp(nats / tokens)
