"""Rotary tables by the length of each sequence, where a model takes them from its whole batch.

LongRoPE has one set of factors for sequences up to ``original_max_position_embeddings`` tokens and
another for longer ones. transformers chooses by the largest position of the batch, so that a short
text beside a long one, or the first piece of a long prompt, gets factors that are not its own. Here
every sequence has those that transformers gives it alone, in one forward over all of its tokens:

- a prompt is read with the factors of its whole length, in whatever pieces;
- a sequence that grows past the original length while it is generated is read anew from its first
  token, once, with the long factors, as Phi-3's own ``generate`` does. Other families' ``generate``
  leaves the short keys in its cache beside long ones, which is no forward of any sequence; their
  tokens are here, too, those of a full forward.

The other rope types of transformers depend on nothing but the position, within the lengths that are
served: ``dynamic`` stretches only what is longer than ``max_position_embeddings``, and such texts
are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Tables = tuple[torch.Tensor, torch.Tensor]


class RopeByLength:
    """The rotary embeddings of one model that choose by length; often there are none.

    Args:
        model: A transformers model; not changed but within ``sequences``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (one, _short_factor_limits(one)) for one in model.modules() if _short_factor_limits(one)
        ]
        self._limits_tokens = frozenset(
            limit for _, limits in self._modules for limit in limits.values()
        )

    @property
    def kinds(self) -> int:
        """How many lengths there are at which the factors change."""
        return len(self._limits_tokens)

    def kind(self, tokens: int) -> int:
        """Which factors a sequence of ``tokens`` tokens has: a number for each set."""
        return sum(limit < tokens for limit in self._limits_tokens)

    def changes(self, before: int, after: int) -> bool:
        """Whether a sequence of ``after`` tokens has other factors than one of ``before``."""
        return self.kind(before) != self.kind(after)

    @contextmanager
    def sequences(self, lengths: list[list[int]], device: torch.device) -> Iterator[None]:
        """Within, a forward takes every row's factors from the length of its own sequence.

        Args:
            lengths: ``[n, T]``, or what spreads to it, tokens of the sequence that is at this place
                of the batch; padding not counted.
            device: Of the model.
        """
        if not self._modules:
            yield
            return
        table = torch.tensor(lengths, device=device)
        plain = [module.forward for module, _ in self._modules]
        for module, limits in self._modules:
            module.forward = _by_length(module.forward, limits, table)
        try:
            yield
        finally:
            for (module, _), forward in zip(self._modules, plain, strict=True):
                module.forward = forward


def _short_factor_limits(module: nn.Module) -> Mapping[str | None, int]:
    """Layer type (None: all alike) → the longest sequence with short factors."""
    kinds: Any = getattr(module, "rope_type", None)
    if kinds == "longrope":
        known: Any = module.config
        return {None: int(known.rope_parameters["original_max_position_embeddings"])}
    if isinstance(kinds, dict):
        known = module.config
        return {
            kind: int(known.rope_parameters[kind]["original_max_position_embeddings"])
            for kind, name in kinds.items()
            if name == "longrope"
        }
    return {}


def _by_length(
    forward: Callable[..., Tables], limits: Mapping[str | None, int], lengths: torch.Tensor
) -> Callable[..., Tables]:
    def chosen(x: torch.Tensor, position_ids: torch.Tensor, *rest: Any, **named: Any) -> Tables:
        layer_type = named.get("layer_type", rest[0] if rest else None)
        limit = limits.get(layer_type)
        if limit is None:
            return forward(x, position_ids, *rest, **named)
        is_long = lengths > limit
        # The module looks at the largest position alone: padding of short rows must not reach it,
        # and for long ones a position is added that is large enough.
        short = forward(x, position_ids.clamp(max=limit - 1), *rest, **named)
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), limit)
        longer = forward(x, torch.cat((position_ids, beyond), dim=-1), *rest, **named)
        cos, sin = (
            torch.where(is_long[..., None], of_long[..., :-1, :], of_short)
            for of_short, of_long in zip(short, longer, strict=True)
        )
        return cos, sin

    return chosen
