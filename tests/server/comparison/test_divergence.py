"""Divergences of plain numbers against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, logsigmoid

from server.comparison.divergence import chosen_labels, label_divergence, token_divergence


def pair(size: int, seed: int, distance: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, generator=generator, dtype=torch.float64) * 3
    return first, first + torch.randn(size, generator=generator, dtype=torch.float64) * distance


@pytest.mark.parametrize("seed", range(5))
def test_divergence_of_one_of_several_labels_is_that_of_torch(seed: int) -> None:
    first, second = pair(2 + seed, seed)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    truth = float(kl_div(q, p, log_target=True, reduction="sum"))
    found = label_divergence(first.tolist(), second.tolist(), "softmax")
    assert found == pytest.approx(truth, rel=1e-9)
    assert label_divergence(second.tolist(), first.tolist(), "softmax") != pytest.approx(truth)


@pytest.mark.parametrize("seed", range(5))
def test_divergence_of_several_labels_at_once_is_the_sum_of_theirs(seed: int) -> None:
    first, second = pair(3, seed)
    truth = 0.0
    for one, other in zip(first, second, strict=True):
        p = torch.stack([logsigmoid(one), logsigmoid(-one)])
        q = torch.stack([logsigmoid(other), logsigmoid(-other)])
        truth += float(kl_div(q, p, log_target=True, reduction="sum"))
    found = label_divergence(first.tolist(), second.tolist(), "sigmoid")
    assert found == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "none"])
def test_equal_answers_do_not_diverge_and_far_ones_do_not_overflow(kind: str) -> None:
    told: list[float] = [-800.0, 0.5, 900.0]
    chosen: object = kind
    assert label_divergence(told, told, chosen) == 0.0  # type: ignore[arg-type]
    far = label_divergence(told, told[::-1], chosen)  # type: ignore[arg-type]
    assert far == pytest.approx({"softmax": 1700.0, "sigmoid": 1700.0, "none": 0.0}[kind])


def test_the_labels_of_an_answer() -> None:
    assert chosen_labels([0.1, 2.0, -1.0], "softmax") == (1,)
    assert chosen_labels([0.1, 2.0, -1.0], "sigmoid") == (0, 1)
    assert chosen_labels([-0.1], "sigmoid") == ()
    assert chosen_labels([3.0], "none") == ()


@pytest.mark.parametrize("seed", range(5))
def test_divergence_of_the_likeliest_tokens_stays_below_the_whole_and_comes_near(seed: int) -> None:
    first, second = (one.log_softmax(-1) for one in pair(2000, seed, 0.2))
    whole = float(kl_div(second, first, log_target=True, reduction="sum"))
    found = []
    for count in (20, 200, 2000):
        told = [
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            for top in (first.topk(count), second.topk(count))
        ]
        found.append(token_divergence(*told))
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole, rel=1e-6)
    assert found[1] > 0.8 * whole
