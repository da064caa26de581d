"""Products in fixed numbers of rows: the same bits wherever a row stands, and right in float64."""

from __future__ import annotations

import pytest
import torch

from adapters.kernels.reference import modulated_linear
from adapters.modulation.fixed_blocks import FixedBlocks, run
from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.workspace import Workspace
from adapters.segments import from_runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (97, 64), (320, 32), (128, 8)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(300, shape[1], generator=generator).to(dtype)
    blocks = FixedBlocks()
    alone = torch.cat([blocks.product(row[None], weight) for row in x])
    for _ in range(20):
        many = int(torch.randint(1, 300, (), generator=generator))
        order = torch.randperm(300, generator=generator)[:many]
        assert torch.equal(blocks.product(x[order], weight), alone[order])
    truth = x.double() @ weight.double().t()
    most = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(alone.double(), truth, rtol=2e-2, atol=most)


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_a_call_is_the_equation(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    named: dict[str, str] = {"quantization": kind}
    weight = QuantizedWeight.from_dense(random(64, 128), **named)  # type: ignore[arg-type]
    slots = {
        1: SlotFactors("hira", random(4, 128), random(64, 4), bias=random(64)),
        2: SlotFactors("lora", random(4, 128), random(64, 4), 0.5),
    }
    segments = from_runs([(1, 3), (0, 5), (2, 20), (1, 1)])
    x, bias = random(segments.rows, 128), random(64)
    call = LayerCall("x", x, weight, slots, segments, bias)
    found = run(call, FixedBlocks(), Workspace(), FoldedCache(1 << 20, torch.device("cpu")))
    truth = modulated_linear(
        x,
        weight.dequantize(),
        {slot: (one.method, one.a, one.b, one.scale, one.bias) for slot, one in slots.items()},
        segments,
        bias,
    )
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-3)
