"""What one static step reads and writes, in memory that stays where it is from step to step.

The host writes the numbers of the rows before a step and reads the answers after it; between the
two nothing passes. A row may read the token that the step before chose for it, which the host then
need not know. Rows that stand for nobody write to a page that nobody owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from server.generation.kv_cache import WRITE_PAGE, AttentionKind, KVCache

MOST_TOLD: Final = 20  # likeliest tokens told beside each
HOST_TOKEN: Final = -1  # in place of a row of the step before: the host knows the token
# Copies on the host: one step may be under way while the next one is written.
_IN_TURN: Final = 2


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """One row of a step, as the host knows it.

    Args:
        token_id: The latest token, which the step reads; anything where ``source`` names a row.
        source: The row of the step before that chose this token, or ``HOST_TOKEN``.
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
    min_p: float
    penalty: float
    sampled: bool
    point: float
    source: int = HOST_TOKEN


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
        self._whole = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._choice = torch.zeros(7, rows, dtype=torch.float64, device=device)
        self._tables = torch.zeros(len(self._kinds), rows, pages, dtype=torch.int32, device=device)
        self._cuda = device.type == "cuda"
        # A copy to the device may still be under way when the next step is written: they alternate.
        self._host = [
            [
                torch.zeros(one.shape, dtype=one.dtype, pin_memory=self._cuda)
                for one in (self._whole, self._choice, self._tables)
            ]
            for _ in range(_IN_TURN)
        ]
        self._turn = 0
        # Tokens that each seat has had, for the repetition penalty; the last seat is nobody's.
        self.seen = torch.zeros(rows + 1, vocabulary, dtype=torch.bool, device=device)
        told = 1 + min(MOST_TOLD, vocabulary)
        # Token ids, then the likeliest ones; log-probabilities of all of these, then whether the
        # logits were finite. In one piece of memory, so that one copy tells all.
        self._told_shape = (told, rows)
        nbytes = rows * (8 * told + 4 * (told + 1))
        self._told = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.told_ids, self.told_scores = _as_told(self._told, self._told_shape)
        self._told_host = [
            torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(_IN_TURN)
        ]
        self._told_turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(one.nbytes for one in self.all())

    def all(self) -> list[torch.Tensor]:
        """Every buffer, whole."""
        return [self._whole, self._choice, self._tables, self.seen, self._told]

    def ids(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``: tokens that the host wrote."""
        return self._whole[0, :rows]

    def sources(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``: rows of the step before, or ``HOST_TOKEN``."""
        return self._whole[3, :rows]

    def read_ids(self, rows: int) -> torch.Tensor:
        """A new int64 ``[rows]``: the token that each row reads, from wherever it is."""
        sources = self.sources(rows)
        chosen = self.told_ids[0].index_select(0, sources.clamp(min=0))
        return torch.where(sources >= 0, chosen, self.ids(rows))

    def positions(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self._whole[1, :rows]

    def seats(self, rows: int) -> torch.Tensor:
        """int64 ``[rows]``."""
        return self._whole[2, :rows]

    def choice(self, rows: int) -> torch.Tensor:
        """float64 ``[7, rows]``: temperature, top_k, top_p, min_p, penalty, sampled, point."""
        return self._choice[:, :rows]

    def table(self, kind: AttentionKind, rows: int) -> torch.Tensor:
        """int32 ``[rows, pages]``."""
        return self._tables[self._kinds.index(kind), :rows]

    def fill(self, numbers: Sequence[RowNumbers]) -> None:
        """Write the rows of the next step; those beyond stand for nobody."""
        self._turn = (self._turn + 1) % _IN_TURN
        whole, choice, tables = self._host[self._turn]
        whole.zero_()
        whole[2] = self.spare_seat
        whole[3] = HOST_TOKEN
        choice.zero_()
        choice[[0, 2, 4]] = 1.0
        tables.fill_(WRITE_PAGE)
        columns = [(one.token_id, one.position, one.seat, one.source) for one in numbers]
        whole[:, : len(numbers)] = torch.tensor(columns, dtype=torch.int64).t()
        wishes = [
            (
                one.temperature,
                one.top_k,
                one.top_p,
                one.min_p,
                one.penalty,
                one.sampled,
                one.point,
            )
            for one in numbers
        ]
        choice[:, : len(numbers)] = torch.tensor(wishes, dtype=torch.float64).t()
        for place, kind in enumerate(self._kinds):
            for row, one in enumerate(numbers):
                pages = one.tables[kind]
                tables[place, row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for device, host in zip(
            (self._whole, self._choice, self._tables), self._host[self._turn], strict=True
        ):
            device.copy_(host, non_blocking=True)

    def told(self) -> ToldNumbers:
        """Begin the one copy back of a step that was launched; the next step may be launched
        before anybody reads it, but no third one."""
        self._told_turn = (self._told_turn + 1) % _IN_TURN
        host = self._told_host[self._told_turn]
        host.copy_(self._told, non_blocking=True)
        event: Any = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return ToldNumbers(*_as_told(host, self._told_shape), event)


@dataclass(frozen=True, slots=True)
class ToldNumbers:
    """What one step has told, on its way to the host."""

    ids: torch.Tensor
    scores: torch.Tensor
    event: Any  # None: it is there

    def read(self, rows: int) -> tuple[list[list[int]], list[list[float]]]:
        """Of each of so many rows, token ids and scores as ``StepBuffers`` has them; waits."""
        if self.event is not None:
            self.event.synchronize()
        return self.ids[:, :rows].t().tolist(), self.scores[:, :rows].t().tolist()


def _as_told(memory: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ``[told, rows]`` and float32 ``[told + 1, rows]`` in one piece of memory."""
    told, rows = shape
    ids = memory[: 8 * told * rows].view(torch.int64).view(told, rows)
    return ids, memory[8 * told * rows :].view(torch.float32).view(told + 1, rows)
