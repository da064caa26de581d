"""Where the texts of a batch without padding begin and end, for what attends to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

# Attends to all texts of a batch: query, key and value ``[N, heads, dim]``, the texts, scale,
# window and whether it is causal; returns ``[N, heads, dim]``.
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "TextBounds", float | None, int | None, bool],
    torch.Tensor,
]


class TextBounds:
    """Where the texts of one flattened batch begin and end; what its attention layers are given.

    Args:
        lengths: Tokens of each text, in order.
        starts: int32 ``[texts + 1]`` on the device: the first row of each, then how many there are.
        attend: What attends.
    """

    def __init__(self, lengths: Sequence[int], starts: torch.Tensor, attend: Attend) -> None:
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self.starts = starts
        self.attend = attend
        self.windows: list[bool] = []  # of each layer that has attended, whether it had a window

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbours of one length: the first row of each run, its texts and their tokens."""
        start = 0
        for tokens, same in groupby(self.lengths):
            count = sum(1 for _ in same)
            yield start, count, tokens
            start += count * tokens
