"""Frozen base weights as this project holds them: 4-bit, 8-bit or plain, and dequantization.

bitsandbytes packs the weights; from then on the packed bytes are ours. Its module forward is never
run: in eval mode on a CPU with AVX512-BF16 it repacks the weight in place, after which every
dequantization of it is garbage. The products with activations belong to the kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from adapters.kernels.triton_operands import PackedWeight, ungrouped

WeightKind = Literal["nf4", "fp4", "int8", "dense"]

_INT8_LEVELS = 127.0
_DEFAULT_BLOCK = 64
# From this block size bitsandbytes itself leaves its AVX512 kernel, for accuracy.
_NATIVE_BLOCK_LIMIT = 2048
_NATIVE_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class QuantizedWeight:
    """A frozen weight W0 ``[out, in]`` in the storage that the base was loaded with.

    Args:
        kind: How ``stored`` encodes W0.
        shape: ``(out, in)``.
        stored: nf4, fp4: uint8, two weights a byte, the first in the high half, rows one after the
            other. int8: ``[out, in]``. dense: the weight itself, ``[in, out]`` if ``transposed``.
        scales: float32. nf4, fp4: the largest magnitude of each block; int8: that of each row.
        block: Weights that share a scale (nf4, fp4).
        transposed: Of a dense weight only, as GPT-2's Conv1D stores it.
        grouped: The 4-bit codes are in the order of ``triton_operands.PackedWeight``.
    """

    __slots__ = ("block", "grouped", "kind", "scales", "shape", "stored", "transposed")

    def __init__(
        self,
        kind: WeightKind,
        shape: tuple[int, int],
        stored: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        block: int = 0,
        transposed: bool = False,
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.stored = stored
        self.scales = scales
        self.block = block
        self.transposed = transposed
        self.grouped = False

    @classmethod
    def from_linear4bit(cls, module: nn.Module) -> QuantizedWeight:
        """Take over the packed weight of a bitsandbytes ``Linear4bit``; the bytes are shared.

        Nested scales are expanded once, to float32: 0.0625 bytes a weight, 0.5625 in all. The
        module's own state is made to share them, so that no second copy stays.

        Raises:
            ValueError: The weight is not quantized yet, or bitsandbytes' forward has repacked it.
        """
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            raise ValueError("The 4-bit layer holds no quantized weight yet: move it to a device.")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked this 4-bit layer in a forward pass: inject first."
            )
        if state.nested:
            state.absmax = _expand_scales(state)
            state.nested, state.state2, state.offset = False, None, None
        scales = state.absmax = state.absmax.to(torch.float32)
        out_features, in_features = state.shape
        return cls(
            state.quant_type,
            (int(out_features), int(in_features)),
            _bytes_of(weight.data),
            scales,
            block=int(state.blocksize),
        )

    @classmethod
    def from_linear8bit(cls, module: nn.Module) -> QuantizedWeight:
        """Take over the int8 weight of a bitsandbytes ``Linear8bitLt``; the bytes are shared.

        W0 = int8 · scale / 127, row by row. The activations stay unquantized here, so the threshold
        for outliers does not apply.

        Raises:
            ValueError: The weight is not quantized yet.
        """
        weight: Any = module.weight
        state: Any = module.state
        values = weight.CB if getattr(weight, "CB", None) is not None else state.CB
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        values = weight.data if values is None else values
        if scales is None or values.dtype != torch.int8:
            raise ValueError("The 8-bit layer holds no quantized weight yet: move it to a device.")
        out_features, in_features = values.shape
        return cls(
            "int8", (int(out_features), int(in_features)), values.data, scales.to(torch.float32)
        )

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        quantization: Literal["nf4", "fp4", "int8", "none"] = "none",
        *,
        double_quant: bool = True,
        block: int = _DEFAULT_BLOCK,
        transposed: bool = False,
    ) -> QuantizedWeight:
        """Quantize a dense weight as bitsandbytes does, or hold it as it is.

        Args:
            weight: ``[out, in]``, or ``[in, out]`` if ``transposed``; not copied when plain.
            quantization: What to make of it.
            double_quant: Round the scales to 8 bits, as ``bnb_4bit_use_double_quant``.
            block: Weights that share a scale.
            transposed: The weight is GPT-2's Conv1D's.
        """
        rows, columns = (int(size) for size in weight.shape)
        shape = (columns, rows) if transposed else (rows, columns)
        if quantization == "none":
            return cls("dense", shape, weight, transposed=transposed)
        from bitsandbytes import functional

        dense = (weight.t() if transposed else weight).detach().contiguous()
        if quantization == "int8":
            values, scales, _ = functional.int8_vectorwise_quant(dense.to(torch.float16))
            return cls("int8", shape, values, scales.to(torch.float32))
        packed, state = functional.quantize_4bit(
            dense, blocksize=block, compress_statistics=double_quant, quant_type=quantization
        )
        scales = _expand_scales(state) if state.nested else state.absmax.to(torch.float32)
        return cls(quantization, shape, _bytes_of(packed), scales, block=block)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight and its scales."""
        return self.stored.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def take_order(self, packed: PackedWeight) -> PackedWeight:
        """Store the codes in the order of ``packed``, which was made from this weight.

        The bytes are overwritten where they are, so that nothing is held twice; ``dequantize``
        gives what it gave before.

        Returns:
            ``packed`` on the bytes of this weight.
        """
        if packed.grouped and not self.grouped:
            self.stored.copy_(packed.packed.view_as(self.stored))
            self.grouped = True
        return replace(packed, packed=self.stored.reshape(-1))

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Whether ``dequantize`` to ``dtype`` is free: the weight is stored so."""
        return self.kind == "dense" and self.stored.dtype == dtype

    def dequantize(
        self, out: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """W0 in a floating type.

        Args:
            out: A contiguous ``[out, in]`` buffer to fill; its dtype goes before ``dtype``. Not
                used, and not written, when the weight is already stored so.
            dtype: What to return.

        Returns:
            ``[out, in]``: ``out``, a new tensor, or the stored weight itself. Never write to it.
        """
        dtype = dtype if out is None else out.dtype
        if self.kind == "dense":
            dense = self.stored.t() if self.transposed else self.stored
            if dense.dtype == dtype:
                return dense
            return dense.to(dtype) if out is None else out.copy_(dense)
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        assert self.scales is not None
        if self.kind == "int8":
            # Integers up to 127 are exact in bfloat16; the product is made in float32.
            return out.copy_(self.stored).mul_((self.scales / _INT8_LEVELS).unsqueeze(1))
        stored = ungrouped(self.stored) if self.grouped else self.stored
        if out.device.type == "cpu":
            native = self._native(dtype)
            if native is None:
                plain = unpack_4bit(
                    stored, self.scales, self.kind, shape=self.shape, block=self.block
                )
                return out.copy_(plain)
            native(
                ctypes.c_void_p(stored.data_ptr()),
                ctypes.c_void_p(self.scales.data_ptr()),
                ctypes.c_void_p(out.data_ptr()),
                ctypes.c_longlong(self.block),
                ctypes.c_longlong(self.shape[0]),
                ctypes.c_longlong(self.shape[1]),
            )
            return out
        torch.ops.bitsandbytes.dequantize_4bit.out(
            stored, self.scales, self.block, self.kind, list(self.shape), dtype, out=out
        )
        return out

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of W0, without the others: what an embedding looks up.

        Args:
            ids: Integers of any shape, below ``shape[0]``.
            dtype: What to return.

        Returns:
            ``[*ids.shape, in]``.

        Raises:
            ValueError: 4-bit rows that share blocks with their neighbours, or 8-bit storage.
        """
        if self.kind == "dense":
            return torch.nn.functional.embedding(ids, self.dequantize(dtype=dtype))
        if self.kind == "int8" or self.shape[1] % self.block:
            raise ValueError(f"Rows of {self.kind} {self.shape} in blocks of {self.block}.")
        assert self.scales is not None
        packed = self.stored.reshape(self.shape[0], -1)[ids]
        packed = ungrouped(packed) if self.grouped else packed  # a group never crosses rows
        pairs = _code_pairs(self.kind).to(self.device)[packed.int()]
        values = pairs.view(*ids.shape, -1, self.block)
        scales = self.scales.view(self.shape[0], -1)[ids]
        return (values * scales.unsqueeze(-1)).view(*ids.shape, -1).to(dtype)

    def to(self, device: torch.device) -> None:
        """Move the scales and, unless dense, the stored bytes; a dense parameter moves itself."""
        if self.kind != "dense":
            self.stored = self.stored.to(device)
        if self.scales is not None:
            self.scales = self.scales.to(device)

    def _native(self, dtype: torch.dtype) -> Callable[..., None] | None:
        # Its loop starts a block at every row: with rows that are no multiple of the block it
        # reads the wrong scales (64 x 96 is off by more than the weights themselves).
        if self.shape[1] % self.block or self.block >= _NATIVE_BLOCK_LIMIT:
            return None
        return _native_dequantizer(self.kind, dtype)


def unpack_4bit(
    packed: torch.Tensor, scales: torch.Tensor, kind: str, *, shape: tuple[int, int], block: int
) -> torch.Tensor:
    """Dequantize in plain torch, for any shape and device: float32 ``[out, in]``.

    Args:
        packed: uint8, two weights a byte, the first in the high half.
        scales: float32, one a block; blocks run over the flat weight, across rows.
        kind: ``nf4`` or ``fp4``.
        shape: ``(out, in)``.
        block: Weights a scale.
    """
    count = shape[0] * shape[1]
    pairs = _code_pairs(kind).to(packed.device)
    flat = pairs.index_select(0, packed.reshape(-1).int()).reshape(-1)[:count]
    whole = count - count % block
    flat[:whole].view(-1, block).mul_(scales[: whole // block].unsqueeze(1))
    if whole < count:
        flat[whole:].mul_(scales[whole // block])
    return flat.view(shape)


@lru_cache(maxsize=2)
def _code_pairs(kind: str) -> torch.Tensor:
    """``[256, 2]`` float32: the two values that each byte stands for."""
    from bitsandbytes import functional

    with torch.inference_mode(False):
        code = functional.get_4bit_type(kind, device="cpu").to(torch.float32)
        byte = torch.arange(256)
        return torch.stack((code[byte >> 4], code[byte & 0xF]), dim=1)


@lru_cache(maxsize=8)
def _native_dequantizer(kind: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """bitsandbytes' compiled CPU kernel, which fills a given buffer, or None.

    Its torch operator allocates on every call and has no ``out`` form on the CPU. The symbol is
    used only if it agrees with the plain path on a small weight.
    """
    from bitsandbytes import functional
    from bitsandbytes.cextension import lib

    symbol = getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{_NATIVE_SUFFIX.get(dtype)}", None)
    if not callable(symbol):
        return None
    with torch.inference_mode(False):
        trial = torch.linspace(-2.0, 3.0, 4 * 2 * _DEFAULT_BLOCK).view(4, -1)
        packed, state = functional.quantize_4bit(
            trial, blocksize=_DEFAULT_BLOCK, quant_type=kind, compress_statistics=False
        )
        out = torch.empty(trial.shape, dtype=dtype)
        symbol(
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(state.absmax.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_longlong(_DEFAULT_BLOCK),
            ctypes.c_longlong(trial.shape[0]),
            ctypes.c_longlong(trial.shape[1]),
        )
        shape = (trial.shape[0], trial.shape[1])
        truth = unpack_4bit(
            _bytes_of(packed), state.absmax, kind, shape=shape, block=_DEFAULT_BLOCK
        )
        agrees = torch.allclose(out.float(), truth, rtol=1e-2, atol=1e-3)
    return symbol if agrees else None


def _expand_scales(state: Any) -> torch.Tensor:
    from bitsandbytes import functional

    scales: torch.Tensor = functional.dequantize_blockwise(state.absmax, state.state2)
    scales = scales + state.offset
    return scales.to(torch.float32)


def _bytes_of(packed: torch.Tensor) -> torch.Tensor:
    flat = packed.detach().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)
