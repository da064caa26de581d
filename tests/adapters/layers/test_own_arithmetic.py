"""Subclasses of nn.Linear: those that compute the plain product take adapters, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from adapters.signature import describe, own_arithmetic


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def model() -> nn.Module:
    return nn.ModuleDict(
        {"plain": nn.Linear(4, 4), "falcon": FalconLinear(4, 4), "own": _Doubled(4, 4)}
    )


def test_a_plain_product_in_other_words_takes_adapters() -> None:
    assert set(describe(model(), "x").layers) == {"plain", "falcon"}
    assert own_arithmetic(model()) == ["own"]


def test_a_class_that_has_changed_under_its_name_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return 2 * nn.Linear.forward(self, input)

    monkeypatch.setattr(FalconLinear, "forward", forward)
    assert set(describe(model(), "x").layers) == {"plain"}
