"""The digest of quantized weights: of numbers, not of how they lie; and codes made on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.kernels.triton_operands import pack_weight
from adapters.modulation.quant import QuantizedWeight
from server.base.weights_digest import weights_digest


def weights(seed: int = 0, kind: Any = "nf4") -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: QuantizedWeight.from_dense(torch.randn(64, 256, generator=generator), kind)
        for path in ("a.q", "a.v", "b.q")
    }


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
def test_equal_weights_have_one_digest(kind: str) -> None:
    first, again = weights(kind=kind), weights(kind=kind)
    assert weights_digest(first) == weights_digest(dict(reversed(again.items())))
    assert len(weights_digest(first)) == 32


def test_the_order_of_codes_does_not_count() -> None:
    plain, grouped = weights(), weights()
    for weight in grouped.values():
        assert weight.scales is not None
        packed = pack_weight(weight.stored, weight.scales, "nf4", weight.shape, weight.block)
        weight.take_order(packed)
        assert weight.grouped
    assert weights_digest(plain) == weights_digest(grouped)


def test_any_number_and_any_name_counts() -> None:
    known = {weights_digest(weights())}
    for change in range(5):
        changed = weights()
        one = changed["a.v"]
        assert one.scales is not None
        if change == 0:
            one.stored.view(-1)[777] ^= 1
        elif change == 1:
            one.scales[3] = torch.nextafter(one.scales[3], torch.tensor(9.0))
        elif change == 2:
            changed["a.k"] = changed.pop("a.v")
        elif change == 3:
            one.kind = "fp4"
        else:
            changed["a.v"], changed["b.q"] = changed["b.q"], changed["a.v"]
        known.add(weights_digest(changed))
    assert len(known) == 6
