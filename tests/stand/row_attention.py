"""The slow reference of attention over pages: one row and one head at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from server.generation.attention import Call
from server.generation.page_attention import Pages


def attend_row_by_row(call: Call, pages: Pages, starts: torch.Tensor, most_rows: int) -> None:
    """What ``varlen`` computes, row by row and head by head; on any device, in any float type."""
    page, kv_heads = pages.keys.shape[1:3]
    shared = call.query.shape[1] // kv_heads
    bounds = starts.tolist()
    for number, (start, stop) in enumerate(pairwise(bounds)):
        assert stop - start <= most_rows
        tokens = int(pages.lengths[number])
        own = pages.tables[number, : -(-tokens // page)].long()
        k, v = (one[own].reshape(-1, *one.shape[2:]) for one in (pages.keys, pages.values))
        for row in range(start, stop):
            position = tokens - (stop - row)
            first = 0 if pages.window is None else max(0, position - pages.window + 1)
            for head in range(call.query.shape[1]):
                keys, values = (one[first : position + 1, head // shared] for one in (k, v))
                call.out[row, head] = F.scaled_dot_product_attention(
                    call.query[row, head][None], keys, values, scale=call.scale
                )[0]
