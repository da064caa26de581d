"""Layer calls whose rows do not depend on each other in a single bit, whoever shares their batch.

A library of matrix products chooses its kernel by the number of rows, and kernels differ in the
order of their sums. So here every product has one of few fixed numbers of rows, filled up with
zeros; which of them give the same bits, and whether a row's place among the others matters, is
tried on this machine for each shape of weight, on random numbers, before it is relied on.

    y = x (W0 + W0 ⊙ BA)ᵀ + b        every HiRA segment, whatever its rows
    y = x W0ᵀ + s (x Aᵀ) Bᵀ + b      every LoRA segment; without factors the first term alone
"""

from __future__ import annotations

from typing import Final

import torch

from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.torch_path import Weights
from adapters.modulation.workspace import Workspace

BLOCKS: Final = (256, 64, 16)  # rows of a product, if they agree; the last, and 1, stand alone
_TRIALS: Final = 3  # orders of the rows


class FixedBlocks:
    """Products in fixed numbers of rows. One thread uses it."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x weightᵀ, each row as if it were alone.

        Args:
            x: ``[rows, in]``.
            weight: ``[out, in]``, any strides, in the dtype of ``x``.

        Returns:
            A new ``[rows, out]``.
        """
        y = x.new_empty(x.shape[0], weight.shape[0])
        start = 0
        for size in self.sizes(weight):
            while x.shape[0] - start >= size:
                torch.mm(x[start : start + size], weight.t(), out=y[start : start + size])
                start += size
        left = x.shape[0] - start
        if left:
            size = self.sizes(weight)[-1]
            block = x.new_zeros(size, x.shape[1])
            block[:left] = x[start:]
            y[start:] = (block @ weight.t())[:left]
        return y

    def sizes(self, weight: torch.Tensor) -> tuple[int, ...]:
        """The numbers of rows that give the same bits for weights like this, the largest first."""
        key = (tuple(weight.shape), weight.stride(), weight.dtype, torch.get_num_threads())
        if key not in self._sizes:
            self._sizes[key] = _agreeing(weight)
        return self._sizes[key]


def _agreeing(like: torch.Tensor) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    rows, least = BLOCKS[0], BLOCKS[-1]
    weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn(rows, weight.shape[1], generator=generator).to(like.device, like.dtype)
    wanted = _in_blocks(x, weight, least)
    for _ in range(_TRIALS):
        order = torch.randperm(rows, generator=generator)
        if not torch.equal(_in_blocks(x[order], weight, least), wanted[order]):
            return (1,)
    padded = torch.zeros(least, weight.shape[1], dtype=like.dtype, device=like.device)
    padded[0] = x[7]
    if not torch.equal((padded @ weight.t())[0], wanted[7]):
        return (1,)
    agreeing = [size for size in BLOCKS[:-1] if torch.equal(_in_blocks(x, weight, size), wanted)]
    return (*agreeing, least)


def _in_blocks(x: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([x[start : start + size] @ weight.t() for start in range(0, len(x), size)])


def run(
    call: LayerCall, blocks: FixedBlocks, workspace: Workspace, folded: FoldedCache
) -> torch.Tensor:
    """A call of one layer: a new ``[rows, out]``, its rows independent of each other.

    Args:
        call: Of one layer.
        blocks: What computes its products.
        workspace: Its buffers are overwritten.
        folded: Folded weights are kept there as far as they fit; kept or not, they are the same.
    """
    weights = Weights(call, workspace, folded)
    y = call.new_output()
    thin: list[slice] = []
    biases: list[tuple[slice, torch.Tensor]] = []
    for part, own in zip(call.segments.parts, call.factors, strict=True):
        rows = slice(part.start, part.stop)
        found = None if own is None else own.to(call.x.dtype)
        bias = call.bias if found is None or found.bias is None else found.bias
        if bias is not None:
            biases.append((rows, bias))
        if found is not None and found.method == "hira":
            y[rows] = blocks.product(call.x[rows], weights.folded(part.slot, found, "kept"))
        else:
            thin.append(rows)
    if thin:
        # Rows of all these segments fill the blocks together.
        x = torch.cat([call.x[rows] for rows in thin])
        of_base = blocks.product(x, weights.base)
        start = 0
        for rows in thin:
            stop = start + rows.stop - rows.start
            y[rows] = of_base[start:stop]
            start = stop
    for part, own in zip(call.segments.parts, call.factors, strict=True):
        if own is not None and own.method == "lora":
            rows, lora = slice(part.start, part.stop), own.to(call.x.dtype)
            inner = blocks.product(call.x[rows], lora.a)
            y[rows] += blocks.product(inner, lora.b) * lora.scale
    for rows, bias in biases:
        y[rows] += bias
    return y
