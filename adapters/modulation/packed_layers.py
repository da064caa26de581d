"""A model's 4-bit weights in the order that the GPU kernels read, changed in place and once."""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import ShapeMismatch
from adapters.kernels.triton_operands import PackedWeight, pack_weight
from adapters.modulation.quant import QuantizedWeight


def packed_layers(weights: Mapping[str, QuantizedWeight]) -> dict[str, PackedWeight]:
    """The weights that the kernels can serve; their bytes are put into the kernels' order.

    Args:
        weights: By layer path. Tied layers, which have one weight, are reordered once.
    """
    layers: dict[str, PackedWeight] = {}
    shared: dict[int, PackedWeight] = {}
    for path, weight in weights.items():
        if weight.kind not in ("nf4", "fp4"):
            continue
        address = weight.stored.data_ptr()
        if address in shared:
            weight.grouped = shared[address].grouped
        else:
            assert weight.scales is not None
            try:
                packed = pack_weight(
                    weight.stored, weight.scales, weight.kind, weight.shape, weight.block
                )
            except ShapeMismatch:  # rows of an odd number of inputs
                continue
            shared[address] = weight.take_order(packed)
        layers[path] = shared[address]
    return layers
