"""Adapted layers: a frozen base layer and the factors of every resident adapter that targets it.

Each reads the current plan from the modulator it shares with its model. Without a plan, or when no
slot of the batch has factors here, it is the bare base layer. Linear layers are replaced, because
their storage becomes ours; embeddings and convolutions keep their own module, parameters and
buffers, and get a subclass in place of their class, as ``torch.nn.utils.parametrize`` does: so what
a subclass of transformers does around the lookup stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from adapters.modulation.layer_call import LayerCall
from adapters.modulation.modulator import Modulator
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import Segments
from adapters.signature import LayerSignature

EMBEDDING_BLOCK = 64  # numbers of a 4-bit table that share a scale; rows share none


class AdaptedLayer(Protocol):
    """What a model's adapted layers have in common."""

    layer_signature: LayerSignature
    slots: dict[int, SlotFactors]  # written by the loader's thread, for slots not in use


class AdaptedLinear(nn.Module):
    """A linear layer, plain, 4-bit or 8-bit, or GPT-2's Conv1D, for many adapters at once.

    y = (W0 ⊙ (1 + B A)) x + b for HiRA, W0 x + b + s B (A x) for LoRA, per row.

    ``weight`` and ``bias`` are the base's own parameters (packed, where it is quantized), so ties
    between layers and what models read from them (dtype, device) stay as they were.
    """

    def __init__(
        self,
        base: nn.Module,
        signature: LayerSignature,
        modulator: Modulator,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.layer_signature = signature
        self.in_features = signature.in_features
        self.out_features = signature.out_features
        self.is_output = is_output
        self.slots: dict[int, SlotFactors] = {}
        self.modulator = modulator
        self.quantized = _quantized_weight(base, signature)
        self.weight: Any = base.weight
        bias: Any = base.bias
        self.register_parameter("bias", bias)
        self.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``; the rows as the plan says.

        Raises:
            SegmentMismatch: The rows are in no segment table of the current batch.
        """
        modulator, path = self.modulator, self.layer_signature.path
        bias: torch.Tensor | None = self._parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        static = modulator.static
        if static is not None and static.rows is not None:
            y = static.linear(path, rows, bias, static.rows)
            return y.view(*x.shape[:-1], self.out_features)
        plan = modulator.plan
        if plan is None or not plan.touches(self.slots):
            segments = modulator.base_segments(rows.shape[0])
        else:
            segments = plan.of_rows(x.shape[:-1], path, self.is_output)
        call = LayerCall(path, rows, self.quantized, self.slots, segments, bias)
        return modulator.linear(call).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.quantized.kind == "dense":
            self.quantized.stored = self.weight
        else:
            self.quantized.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, storage={self.quantized.kind}"
        )


def _quantized_weight(base: nn.Module, signature: LayerSignature) -> QuantizedWeight:
    known = getattr(base, "quantized", None)
    if isinstance(known, QuantizedWeight):  # tied to a quantized embedding
        return known
    name = type(base).__name__
    from_bitsandbytes = type(base).__module__.startswith("bitsandbytes.")
    if from_bitsandbytes and name == "Linear8bitLt":
        return QuantizedWeight.from_linear8bit(base)
    if from_bitsandbytes:
        return QuantizedWeight.from_linear4bit(base)
    weight: Any = base.weight
    return QuantizedWeight.from_dense(
        weight, transposed=signature.kind == "conv1d_transposed" and name == "Conv1D"
    )


class QuantizedEmbedding(nn.Embedding):
    """A frozen embedding whose table is stored in 4 bits; only what is looked up is dequantized.

    ``weight`` holds the packed bytes, so that what counts a model's memory finds them.
    """

    quantized: QuantizedWeight
    dtype: torch.dtype  # of what it returns

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integers of any shape to ``[..., dim]``."""
        return self.quantized.rows(input, self.dtype)


def quantize_embedding(
    embedding: nn.Embedding,
    quantization: Literal["nf4", "fp4"],
    *,
    double_quant: bool = True,
    tied: Iterable[nn.Module] = (),
) -> None:
    """Store an embedding's table in 4 bits, in place; layers tied to it share the bytes.

    Args:
        embedding: A plain ``nn.Embedding`` whose width is a multiple of the block of 64.
        quantization: How.
        double_quant: Round the scales to 8 bits.
        tied: Linear layers with the same weight, such as a language-model head. They are to be
            injected before they run.

    Raises:
        ValueError: Another class, or another width.
    """
    if type(embedding) is not nn.Embedding or embedding.embedding_dim % EMBEDDING_BLOCK:
        raise ValueError(f"{type(embedding).__name__} of width {embedding.embedding_dim}")
    dense = embedding.weight.data
    stored = QuantizedWeight.from_dense(
        dense, quantization, double_quant=double_quant, block=EMBEDDING_BLOCK
    )
    packed = nn.Parameter(stored.stored, requires_grad=False)
    assert stored.scales is not None
    embedding.__class__ = QuantizedEmbedding
    embedding.weight = packed
    embedding.register_buffer("scales", stored.scales, persistent=False)
    embedding.quantized, embedding.dtype = stored, dense.dtype  # type: ignore[assignment]
    for layer in tied:
        layer.weight = packed
        layer.quantized = stored  # type: ignore[assignment]


class AdaptedEmbedding(nn.Embedding):
    """An embedding for many adapters at once; only the rows looked up are modulated.

    y = E[x] + E[x] ⊙ (A[:, x]ᵀ Bᵀ) for HiRA, E[x] + s A[:, x]ᵀ Bᵀ for LoRA. As in PEFT (0.21,
    ``tuners/hira/layer.py``, ``tuners/lora/layer.py``), a factor that a model multiplies its
    embeddings by applies to LoRA's term and not to HiRA's.
    """

    layer_signature: LayerSignature
    modulator: Modulator
    slots: dict[int, SlotFactors]

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Integers ``[B, T]`` (or ``[1, T]`` for all sequences alike) to ``[B, T, dim]``.

        Raises:
            SegmentMismatch: The rows are in no segment table of the current batch.
        """
        plan = self.modulator.plan
        base: torch.Tensor = super().forward(input, *args, **kwargs)
        if plan is None or not plan.touches(self.slots):
            return base
        many = 1 if plan.sequences is None else plan.sequences.rows
        if many > 1 and input.numel() == input.shape[-1] != plan.tokens.rows:
            # Positions, given once for all sequences: from here on they differ by adapter.
            input = input.reshape(1, -1).expand(many, -1)
            base = base.reshape(1, -1, base.shape[-1]).expand(many, -1, -1)
        segments = plan.of_rows(input.shape, self.layer_signature.path)
        return self._add_residuals(input.reshape(-1), base, segments)

    def _plain(self, ids: torch.Tensor) -> torch.Tensor:
        """The table's own rows, without what a subclass does to them."""
        stored = getattr(self, "quantized", None)
        if stored is None:
            return F.embedding(ids, self.weight)
        rows: torch.Tensor = stored.rows(ids, self.dtype)
        return rows

    def _add_residuals(
        self, ids: torch.Tensor, base: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        y = base.reshape(-1, base.shape[-1]).clone()
        for part in segments.parts:
            factors = self.slots.get(part.slot)
            if factors is None:
                continue
            rows = slice(part.start, part.stop)
            factors = factors.to(y.dtype)
            chosen, fixed = factors.a[:, ids[rows]].t(), self.modulator.fixed
            if fixed is not None:
                delta = fixed.product(chosen, factors.b)
            else:
                delta = chosen @ factors.b.t()
            if factors.method == "hira":
                y[rows].addcmul_(self._plain(ids[rows]), delta)
            else:
                scale = getattr(self, "embed_scale", None)
                if isinstance(scale, torch.Tensor):
                    delta = delta * scale.to(delta.dtype)
                y[rows].add_(delta, alpha=factors.scale)
        return y.view(base.shape)


class _AdaptedConv(nn.modules.conv._ConvNd):
    """A convolution for many adapters at once; its rows are images or sequences.

    W0 ⊙ (1 + BA) for HiRA with BA shaped as the kernel, as PEFT's ``_ConvNd.get_delta_weight``;
    for LoRA the convolution with A, then the 1-wide one with B.
    """

    layer_signature: LayerSignature
    modulator: Modulator
    slots: dict[int, SlotFactors]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[B, channels, ...]``; the rows of the batch as the plan says.

        Raises:
            SegmentMismatch: B is in no segment table of the current batch.
        """
        plan = self.modulator.plan
        if self.modulator.fixed is not None and input.shape[0] > 1:
            # One image at a time: a library chooses its kernel by their number.
            segments = self.modulator.base_segments(input.shape[0])
            if plan is not None and plan.touches(self.slots):
                segments = plan.of_rows((input.shape[0],), self.layer_signature.path)
            return torch.cat(
                [
                    self._segment(input[row : row + 1], self.slots.get(slot))
                    for row, slot in enumerate(segments.row_slots())
                ]
            )
        if plan is None or not plan.touches(self.slots):
            return self._conv(input, self.weight, self.bias)
        segments = plan.of_rows((input.shape[0],), self.layer_signature.path)
        return torch.cat(
            [
                self._segment(input[part.start : part.stop], self.slots.get(part.slot))
                for part in segments.parts
            ]
        )

    def _segment(self, x: torch.Tensor, factors: SlotFactors | None) -> torch.Tensor:
        if factors is None:
            return self._conv(x, self.weight, self.bias)
        factors = factors.to(x.dtype)
        bias = self.bias if factors.bias is None else factors.bias
        if factors.method == "hira":
            rank = factors.rank
            delta = factors.b.reshape(-1, rank) @ factors.a.reshape(rank, -1)
            weight = torch.addcmul(self.weight, self.weight, delta.view(self.weight.shape))
            return self._conv(x, weight, bias)
        y = self._conv(x, self.weight, bias)
        inner = self._conv(x, factors.a, None)
        outer = (F.conv1d, F.conv2d, F.conv3d)[inner.dim() - 3](inner, factors.b)
        return y.add_(outer, alpha=factors.scale)

    def _conv(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    """``nn.Conv1d`` for many adapters."""


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    """``nn.Conv2d`` for many adapters."""


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    """``nn.Conv3d`` for many adapters."""


_ADAPTED_CONV: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
}


def adapt_in_place(module: nn.Module, signature: LayerSignature, modulator: Modulator) -> None:
    """Give an embedding or a convolution the class that serves many adapters, in place."""
    cls = type(module)
    adapted = _ADAPTED_CONV.get(cls)
    if adapted is None:
        # The subclass calls its own super().forward, which is then the plain lookup.
        adapted = type(f"Adapted{cls.__name__}", (AdaptedEmbedding, cls), {})
    module.__class__ = adapted
    module.layer_signature = signature  # type: ignore[assignment]
    module.modulator = modulator  # type: ignore[assignment]
    module.slots = {}  # type: ignore[assignment]
