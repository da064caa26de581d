"""How many tokens one step of the generation lane reads, where nobody has said."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from server.options import EngineOptions

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel

HOST_PREFILL_TOKENS: Final = 1024  # on a CPU more of them only delay those who decode
MOST_PREFILL_TOKENS: Final = 8192
# Of what is free of the device once all else has its own: the rest is for logits and libraries.
_SHARE: Final = 4


def prefill_tokens_of(options: EngineOptions, config: Any, model: Any) -> int:
    """As the options say, else what the device can take.

    Args:
        options: ``prefill_tokens``, and the budgets that will be taken of the device later.
        config: The text config of the base.
        model: transformers' model, on its device.
    """
    if options.prefill_tokens is not None:
        return options.prefill_tokens
    if model.device.type != "cuda" or getattr(config, "sliding_window", None) is not None:
        # The ring of a sliding window must hold a whole step: a larger one takes the cache's room.
        return HOST_PREFILL_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    free -= options.kv_bytes + options.device_bytes
    return tokens_within(free, config, model.dtype.itemsize)


def with_prefill_tokens(options: EngineOptions, adapted: AdaptedModel) -> EngineOptions:
    """Options that say it: both lanes must know, for graphs of one take what prompts need."""
    model: Any = adapted.model
    text = model.config.get_text_config(decoder=True)
    return replace(options, prefill_tokens=prefill_tokens_of(options, text, model))


def tokens_within(free_bytes: int, config: Any, itemsize: int) -> int:
    """Tokens whose activations take a quarter of some memory: 1,024 to 8,192, a power of two.

    Args:
        free_bytes: Of the device.
        config: The text config of the base; says how wide its layers are.
        itemsize: Bytes of an activation.
    """
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # The widest moment of a layer: gate, up, their product and what comes out of it, beside the
    # residual stream, its norm, queries, keys and values.
    each = (3 * inner + 6 * hidden) * itemsize
    tokens = HOST_PREFILL_TOKENS
    while 2 * tokens <= MOST_PREFILL_TOKENS and 2 * tokens * each * _SHARE <= free_bytes:
        tokens *= 2
    return tokens
