"""Running requests, and what of them a step reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.generation.constraints import Constraint
from server.generation.sampling import TokenChooser
from server.inputs.detokenize import TextStream
from server.messages import GeneratedToken, GenerateRequest, Likeliest


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request."""

    request: GenerateRequest
    slot: int
    ids: list[int]  # prompt and generated
    written: int  # tokens whose keys and values are in the cache
    chooser: TokenChooser
    text: TextStream
    constraint: Constraint | None  # what a grammar allows; None: everything
    admitted: float  # time.monotonic()
    tokens: list[GeneratedToken] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # log-probabilities of ids[1:], if asked for
    likeliest: list[Likeliest] = field(default_factory=list)  # in the places of those

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet: 1 while decoding."""
        return len(self.ids) - self.written

    @property
    def generated(self) -> list[int]:
        return self.ids[len(self.request.token_ids) :]

    @property
    def decoding(self) -> bool:
        return bool(self.tokens)

    @property
    def held(self) -> bool:
        """Whether its next step has to wait for what its grammar allows: before it reads a prompt
        to its end, and once a step had to do without it. The first time it does not wait: what a
        grammar allows is worked out while the model computes."""
        one = self.constraint
        if one is None:
            return False
        return self.exhausted or (not one.ready and (self.reading or one.late))

    @property
    def exhausted(self) -> bool:
        """Whether all tokens that were asked for are there."""
        return len(self.tokens) >= self.request.sampling.max_new_tokens > 0

    @property
    def reading(self) -> bool:
        """Whether there is more to read than the latest token: a prompt, or all once more."""
        return not self.decoding or self.pending > 1


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """What one sequence puts into a batch: its next ``rows`` tokens."""

    sequence: Sequence
    rows: int

    @property
    def completes(self) -> bool:
        """Whether the model reads all there is."""
        return self.rows == self.sequence.pending

    @property
    def predicts(self) -> bool:
        """Whether a new token comes out."""
        return self.completes and self.sequence.request.sampling.max_new_tokens > 0

    @property
    def scored(self) -> range:
        """Which tokens of the prompt are told from rows of this part: the one after each."""
        sequence = self.sequence
        if not sequence.request.sampling.prompt_logprobs or sequence.decoding:
            return range(0)
        first = sequence.written + 1
        return range(first, min(first + self.rows, len(sequence.request.token_ids)))
