"""A layer call by the compiled CPU kernel: what it reads of the segments, and LoRA's products.

The choice of how each segment is computed is ``adapters.modulation``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters.costs import Way
from adapters.kernels import native_ops, torch_ops
from adapters.quant import QuantizedWeight
from adapters.segments import BASE_SLOT, Segment, Segments, from_runs
from adapters.slot_factors import SlotFactors
from adapters.workspace import Workspace

_AS: Mapping[Way, bytes] = {
    "base": native_ops.AS_BASE,
    "fold": native_ops.AS_FOLD,
    "expand": native_ops.AS_EXPAND,
}


def takes(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> bool:
    """Whether the kernel is there and takes these rows, weights and bias."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and native_ops.available()
        and weight.shape[1] % native_ops.INPUTS_MULTIPLE == 0
        and not weight.grouped
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


@dataclass(frozen=True, slots=True)
class Call:
    """What the kernel reads of the segments of one call; holds addresses of factors and weights.

    Args:
        rows: That the segments cover.
        bounds: Of ``native_ops.pack_bounds``.
        records: One a segment, joined.
        lora: What the kernel leaves to torch: its rows are base rows to it.
    """

    rows: int
    bounds: bytes
    records: bytes
    lora: tuple[tuple[Segment, SlotFactors], ...] = ()

    @classmethod
    def of(
        cls,
        segments: Segments,
        factors: Sequence[SlotFactors | None],
        ways: Sequence[Way],
        kept: Sequence[torch.Tensor | None],
        bounds: bytes,
    ) -> Call:
        """The call whose segments bring ``factors`` and are computed in ``ways``.

        It is valid while they and the folded weights ``kept``, of segments of that way, live.
        """
        records: list[bytes] = []
        lora: list[tuple[Segment, SlotFactors]] = []
        for part, own, way, weight in zip(segments.parts, factors, ways, kept, strict=True):
            if own is None:
                records.append(native_ops.BASE_RECORD)
                continue
            assert own.native_record
            tail = _AS[way] if weight is None else native_ops.as_kept(weight)
            records.append(own.native_record + tail)
            if own.method == "lora":
                lora.append((part, own))
        return cls(segments.rows, bounds, b"".join(records), tuple(lora))

    @classmethod
    def of_base(cls, rows: int) -> Call:
        """The call for ``rows`` rows of the bare base."""
        every = from_runs([(BASE_SLOT, rows)])
        return cls(rows, native_ops.pack_bounds(every), native_ops.BASE_RECORD)


def run(
    x: torch.Tensor,
    weight: QuantizedWeight,
    call: Call,
    bias: torch.Tensor | None,
    workspace: Workspace,
) -> torch.Tensor:
    """A new ``[rows, out]`` of ``x`` ``[rows, in]``, for which ``takes`` holds."""
    assert x.shape[0] == call.rows
    stored, kind, block = weight.stored, weight.kind, weight.block
    if not native_ops.takes_weight(kind, weight.shape, block):
        stored, kind, block = workspace.dequantized(weight, x.dtype).contiguous(), "dense", 0
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    native_ops.linear_into(
        y,
        x,
        stored=stored,
        scales=weight.scales,
        kind=kind,
        block=block,
        bias=bias,
        bounds=call.bounds,
        records=call.records,
        scratch=workspace.bytes_on_cpu,
    )
    for part, factors in call.lora:
        rows = slice(part.start, part.stop)
        torch_ops.add_lora(y[rows], x[rows], factors.a, factors.b, factors.scale)
    return y
