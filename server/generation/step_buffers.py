"""What one static step reads and writes, in memory that stays where it is from step to step.

The host writes the numbers of the rows before a step and reads the answers after it; between the
two nothing passes. Rows that stand for nobody write to a page that nobody owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.generation.kv_cache import WRITE_PAGE, AttentionKind, KVCache

MOST_TOLD = 20  # likeliest tokens told beside each


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """One row of a step, as the host knows it.

    Args:
        token_id: The latest token, which the step reads.
        position: Of that token.
        seat: Where the step notes which tokens this sequence has had.
        tables: The pages up to the token's own, by kind of layer.
        point: The request's own number for its next token, in [0, 1); 0 where nothing is drawn.
    """

    token_id: int
    position: int
    seat: int
    tables: dict[AttentionKind, list[int]]
    temperature: float
    top_k: int
    top_p: float
    penalty: float
    sampled: bool
    point: float


class StepBuffers:
    """The buffers of all buckets: a smaller one uses the first rows of them.

    Args:
        rows: At most.
        cache: Whose pages the tables name.
        vocabulary: Of the base.
        device: Of the model.
    """

    def __init__(self, rows: int, cache: KVCache, vocabulary: int, device: torch.device) -> None:
        self.rows = rows
        self.vocabulary = vocabulary
        self._cache = cache
        self.spare_seat = rows
        self._kinds = tuple(dict.fromkeys(cache.layer_kinds))
        pages = cache.table_pages
        self._whole = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._choice = torch.zeros(6, rows, dtype=torch.float64, device=device)
        self._tables = torch.zeros(len(self._kinds), rows, pages, dtype=torch.int32, device=device)
        self._host = [
            torch.zeros(one.shape, dtype=one.dtype, pin_memory=device.type == "cuda")
            for one in (self._whole, self._choice, self._tables)
        ]
        # Tokens that each seat has had, for the repetition penalty; the last seat is nobody's.
        self.seen = torch.zeros(rows + 1, vocabulary, dtype=torch.bool, device=device)
        told = 1 + min(MOST_TOLD, vocabulary)
        # Token ids, then the likeliest ones; log-probabilities of all of these, then whether the
        # logits were finite.
        self.told_ids = torch.zeros(told, rows, dtype=torch.int64, device=device)
        self.told_scores = torch.zeros(told + 1, rows, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(one.nbytes for one in self.all())

    def all(self) -> list[torch.Tensor]:
        """Every buffer, whole."""
        told = [self.told_ids, self.told_scores]
        return [self._whole, self._choice, self._tables, self.seen, *told]

    def ids(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self._whole[0, :rows]

    def positions(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self._whole[1, :rows]

    def seats(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self._whole[2, :rows]

    def choice(self, rows: int) -> torch.Tensor:
        """float64 ``[6, rows]``: temperature, top_k, top_p, penalty, sampled, point."""
        return self._choice[:, :rows]

    def table(self, kind: AttentionKind, rows: int) -> torch.Tensor:
        """int32 ``[rows, pages]``."""
        return self._tables[self._kinds.index(kind), :rows]

    def fill(self, numbers: Sequence[RowNumbers]) -> None:
        """Write the rows of the next step; those beyond stand for nobody."""
        whole, choice, tables = self._host
        whole.zero_()
        whole[2] = self.spare_seat
        choice.zero_()
        choice[[0, 2, 3]] = 1.0
        tables.fill_(WRITE_PAGE)
        columns = [(one.token_id, one.position, one.seat) for one in numbers]
        whole[:, : len(numbers)] = torch.tensor(columns, dtype=torch.int64).t()
        wishes = [
            (one.temperature, one.top_k, one.top_p, one.penalty, one.sampled, one.point)
            for one in numbers
        ]
        choice[:, : len(numbers)] = torch.tensor(wishes, dtype=torch.float64).t()
        for place, kind in enumerate(self._kinds):
            for row, one in enumerate(numbers):
                pages = one.tables[kind]
                tables[place, row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for device, host in zip((self._whole, self._choice, self._tables), self._host, strict=True):
            device.copy_(host, non_blocking=True)
