"""A layer call by the compiled CPU kernel: what it reads of the segments, and LoRA's products.

The choice of how each segment is computed is ``adapters.modulation.modulator``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.kernels import native_ops, torch_ops
from adapters.modulation.folded import FoldedCache
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.strategy import Computation
from adapters.modulation.workspace import Workspace
from adapters.segments import Segment

_AS: Mapping[Computation, bytes] = {
    "base": native_ops.AS_BASE,
    "fold": native_ops.AS_FOLD,
    "expand": native_ops.AS_EXPAND,
}


def takes(call: LayerCall) -> bool:
    """Whether the kernel is there and takes these rows, weights, factors and bias."""
    x, weight, bias = call.x, call.weight, call.bias
    found = [own for own in call.factors if own is not None]
    return (
        x.device.type == "cpu"
        and x.shape[0] > 0
        and native_ops.available(x.dtype)
        and weight.shape[1] % native_ops.INPUTS_MULTIPLE == 0
        and not weight.grouped
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
        and all(own.native_record and own.a.dtype == x.dtype for own in found)
        # Rows of a bare weight that is not decoded first are torch's own trade.
        and (bool(found) or weight.kind in {"nf4", "fp4"})
    )


@dataclass(frozen=True, slots=True)
class Records:
    """What the kernel reads of the segments of one call; holds addresses of factors and weights.

    Args:
        bounds: Of ``native_ops.pack_bounds``.
        segments: A record each, joined.
        lora: What the kernel leaves to torch: its rows are base rows to it.
    """

    bounds: bytes
    segments: bytes
    lora: tuple[tuple[Segment, SlotFactors], ...]


def pack_records(
    call: LayerCall,
    ways: Sequence[Computation],
    bounds: bytes,
    workspace: Workspace,
    folded: FoldedCache,
) -> Records:
    """The records of a call whose segments are computed in ``ways``.

    They are valid while the factors and the kept folded weights live.
    """
    records: list[bytes] = []
    lora: list[tuple[Segment, SlotFactors]] = []
    for part, own, way in zip(call.segments.parts, call.factors, ways, strict=True):
        if own is None:
            records.append(native_ops.BASE_RECORD)
            continue
        weight = None
        if way == "kept":
            weight = folded.get(part.slot, call.path)
            assert weight is not None
        elif way == "held":
            weight = workspace.take("folded", call.weight.shape, call.x.dtype, call.x.device)
        tail = _AS[way] if weight is None else native_ops.as_kept(weight)
        records.append(own.native_record + tail)
        if own.method == "lora":
            lora.append((part, own))
    return Records(bounds, b"".join(records), tuple(lora))


def run_native(call: LayerCall, records: Records, workspace: Workspace) -> torch.Tensor:
    """A new ``[rows, out]``, for a call that ``takes`` holds for."""
    weight = call.weight
    stored, kind, block = weight.stored, weight.kind, weight.block
    if not native_ops.takes_weight(kind, weight.shape, block):
        stored, kind, block = workspace.dequantized(weight, call.x.dtype).contiguous(), "dense", 0
    x = call.x.contiguous()
    y = call.new_output()
    native_ops.modulated_linear_into(
        y,
        x,
        stored=stored,
        scales=weight.scales,
        kind=kind,
        block=block,
        bias=call.bias,
        bounds=records.bounds,
        records=records.segments,
        scratch=workspace.bytes_on_cpu,
    )
    for part, factors in records.lora:
        rows = slice(part.start, part.stop)
        torch_ops.add_lora(y[rows], x[rows], factors.a, factors.b, factors.scale)
    return y
