"""Which rows of a layer's input belong to which slot, during one forward of the model.

A batch comes with the segments of its tokens, its sequences and the rows of its logits; a layer
finds its own by the shape of its input. Pure: no torch, no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.errors import SegmentMismatch
from adapters.segments import BASE_SLOT, Segments


@dataclass(slots=True)
class Plan:
    """What the layers read during one forward: the segments of tokens, sequences and logits.

    Args:
        tokens: Of rows ``[B, T, H]`` or ``[1, N, H]``, flattened.
        sequences: Of rows ``[B, H]``, such as a pooler's, and of images.
        logits: Of the rows that reach an output layer, when not all tokens do.
    """

    tokens: Segments
    sequences: Segments | None = None
    logits: Segments | None = None
    slots: tuple[int, ...] = ()  # every slot but the base, in any of the three
    _repeated: dict[int, Segments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = (self.tokens, self.sequences, self.logits)
        found = dict.fromkeys(slot for table in tables if table for slot in table.slots)
        self.slots = tuple(slot for slot in found if slot != BASE_SLOT)

    def touches(self, slots: Mapping[int, object]) -> bool:
        """Whether any slot of this batch has factors among ``slots``."""
        return any(slot in slots for slot in self.slots)

    def of_rows(self, lead: tuple[int, ...], path: str, is_output: bool = False) -> Segments:
        """The segments of an input whose shape less its features is ``lead``.

        Raises:
            SegmentMismatch: The rows are neither the tokens, the sequences nor the logits.
        """
        rows = 1
        for size in lead:
            rows *= size
        tokens, sequences, logits = self.tokens, self.sequences, self.logits
        if is_output and logits is not None and rows == logits.rows:
            return logits
        if rows == tokens.rows:
            return tokens
        if sequences is not None and lead[0] == sequences.rows:
            # As many rows for every sequence: one of a pooled input, one or more of a step.
            times = rows // lead[0]
            if times not in self._repeated:
                self._repeated[times] = sequences.repeat(times)
            return self._repeated[times]
        raise SegmentMismatch(
            f"The input of {path} matches no segment table of this batch.",
            found=f"{rows} rows, shape {tuple(lead)} before the features",
            expected=f"{tokens.rows} tokens"
            + (f" or {sequences.rows} sequences" if sequences is not None else "")
            + (f" or {logits.rows} logits" if logits is not None else ""),
        )
