"""A digest of the quantized weights as they are served: the same on every device that serves them.

Two replicas with the same digest multiply by the same numbers, whatever their devices; which
checkpoint they came from is another question (``server.base.digest``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from adapters.kernels.triton_operands import ungrouped
from adapters.modulation.quant import QuantizedWeight

_PIECE_BYTES = 1 << 26  # brought to the host at one time


def weights_digest(weights: Mapping[str, QuantizedWeight]) -> str:
    """BLAKE2 over every weight by its path: how it is stored, its shape, its codes and scales.

    Args:
        weights: By layer path, on any device. In whatever order their codes lie, they count in that
            of bitsandbytes.

    Returns:
        32 hex digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(weights):
        weight = weights[path]
        told = [path, weight.kind, list(weight.shape), weight.block, weight.transposed]
        digest.update(json.dumps([*told, str(weight.stored.dtype)]).encode())
        stored = ungrouped(weight.stored) if weight.grouped else weight.stored
        for tensor in (stored, weight.scales):
            if tensor is None:
                continue
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for start in range(0, len(flat), _PIECE_BYTES):
                digest.update(flat[start : start + _PIECE_BYTES].cpu().numpy().data)
    return digest.hexdigest()
