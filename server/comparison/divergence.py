"""How far two answers to one text are from each other; plain numbers, no model.

The first answer is always that on the unquantized base, P, the second that on the quantized one, Q:

    KL(P || Q) = Σ_i p_i (log p_i - log q_i), in nats, 0 where nothing changed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

from server.messages import Likeliest

ScoreKind = Literal["softmax", "sigmoid", "none"]
# What log-probabilities in float32 leave of a sum to 1; a smaller rest is rounding.
_LEAST_REST: Final = 1e-7


def chosen_labels(logits: Sequence[float], kind: ScoreKind) -> tuple[int, ...]:
    """The places of the labels that an answer stands for.

    Args:
        logits: Of the labels, in their order.
        kind: ``softmax``: the likeliest label; ``sigmoid``: every label above one half; ``none``:
            a value decides nothing.
    """
    if kind == "softmax":
        return (max(range(len(logits)), key=lambda place: logits[place]),)
    if kind == "sigmoid":
        return tuple(place for place, one in enumerate(logits) if one > 0.0)
    return ()


def label_divergence(first: Sequence[float], second: Sequence[float], kind: ScoreKind) -> float:
    """KL(P || Q) of two answers of a classifier, in nats, 0 or more.

    Args:
        first, second: Logits of the labels, in the same order.
        kind: ``softmax``: one distribution; ``sigmoid``: the sum over the labels, each a yes or no
            of its own; ``none``: no distribution, so 0.
    """
    if kind == "none":
        return 0.0
    if kind == "softmax":
        pairs = zip(_log_softmax(first), _log_softmax(second), strict=True)
        return max(0.0, math.fsum(math.exp(p) * (p - q) for p, q in pairs))
    terms = []
    for one, other in zip(first, second, strict=True):
        for sign in (1.0, -1.0):
            p, q = _log_sigmoid(sign * one), _log_sigmoid(sign * other)
            terms.append(math.exp(p) * (p - q))
    return max(0.0, math.fsum(terms))


def token_divergence(first: Likeliest, second: Likeliest) -> float:
    """KL(P || Q) of two distributions of the next token, in nats, from the likeliest of each.

    Tokens that both name count one by one, all others as one: never more than the divergence of
    the whole distributions, and close to it when what is left over is rare.

    Args:
        first, second: Ids and log-probabilities, the likeliest first.
    """
    others = dict(second)
    pairs = [(one, others[token]) for token, one in first if token in others]
    terms = [math.exp(p) * (p - q) for p, q in pairs]
    rest = max(1.0 - math.fsum(math.exp(p) for p, _ in pairs), _LEAST_REST)
    other_rest = max(1.0 - math.fsum(math.exp(q) for _, q in pairs), _LEAST_REST)
    return max(0.0, math.fsum([*terms, rest * math.log(rest / other_rest)]))


def _log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(one - top) for one in logits))
    return [one - total for one in logits]


def _log_sigmoid(logit: float) -> float:
    return -math.log1p(math.exp(-logit)) if logit >= 0 else logit - math.log1p(math.exp(logit))
