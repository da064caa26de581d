"""What the tokens of a sequence come to: its text, the events of its stream, its result.

No request is queued here, no page or lease held, and no forward run: that is the lane's.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from server.generation.constraints import Constraint, Constraints
from server.generation.sampling import Choice, TokenChooser
from server.generation.sequences import Sequence
from server.inputs.detokenize import TextStream, spelled_apart, spelling_of
from server.messages import (
    FinishReason,
    GeneratedToken,
    GenerateRequest,
    GenerateResult,
    TokenEvent,
)


class SequenceEvents:
    """Begins sequences and takes in the tokens that are chosen for them.

    Args:
        model: transformers' model; its generation config says which tokens end an answer.
        tokenizer: transformers' tokenizer of the base.
        constraints: Makes what holds a sequence to its grammar.
    """

    def __init__(self, model: Any, tokenizer: Any, constraints: Constraints) -> None:
        self._tokenizer = tokenizer
        self._constraints = constraints
        self._special_ids = spelling_of(tokenizer).special
        self._eos_ids = _eos_ids(model, tokenizer)

    def begin(self, request: GenerateRequest, slot: int, written: int = 0) -> Sequence:
        """A sequence of which the cache holds ``written`` tokens already."""
        return Sequence(
            request=request,
            slot=slot,
            ids=list(request.token_ids),
            written=written,
            chooser=TokenChooser(
                request.sampling,
                request.token_ids,
                {*self.ends_of(request), *request.sampling.stop_ids},
            ),
            text=TextStream(
                self._tokenizer,
                request.token_ids,
                request.sampling.stop,
                free_tokens=max(0, request.sampling.min_tokens - 1),
                shown=request.sampling.shown_ids,
            ),
            constraint=self._constraint(request),
            admitted=time.monotonic(),
        )

    def _constraint(self, request: GenerateRequest) -> Constraint | None:
        options = request.sampling
        if options.grammar is None:
            return None
        ends = {*self.ends_of(request), *options.stop_ids}
        return self._constraints.begin(options.grammar, ends)

    def advance(
        self, sequence: Sequence, choice: Choice
    ) -> tuple[list[TokenEvent], FinishReason | None]:
        """Take in a token: its event, if it is streamed, and why the sequence ends with it."""
        request = sequence.request
        token = choice.token_id
        special = token in self._special_ids
        sequence.ids.append(token)
        sequence.chooser.note(token)
        others = [(one, sequence.text.peek(one)) for one, _ in choice.likeliest]
        text, shown = sequence.text.push(token)
        alternatives = spelled_apart(self._tokenizer, (token, text), others, choice.likeliest)
        known = (choice.logprob, special, alternatives)
        sequence.tokens.append(GeneratedToken(token, text, *known))
        events: list[TokenEvent] = []
        if request.stream:
            spelling = None if shown == text else text
            events.append(TokenEvent(request.id, token, shown, *known, spelling))
        reason: FinishReason | None = None
        if sequence.text.stopped or token in request.sampling.stop_ids:
            reason = "stop_sequence"
        elif token in self.ends_of(request):
            reason = "eos_token"
        elif sequence.exhausted and sequence.constraint is None:
            reason = "length"
        if reason is None and sequence.constraint is not None:
            # Which may end it: the lane asks at its next step.
            self._constraints.follow(sequence.constraint, token)
        return events, reason

    def ends_of(self, request: GenerateRequest) -> Collection[int]:
        """Tokens that end the answer: the request's own, which are its adapter's, or the base's."""
        own = () if request.sampling.ignore_eos else request.sampling.end_ids
        return self._eos_ids if own is None else own


def result_of(sequence: Sequence, reason: FinishReason, arrived: float) -> GenerateResult:
    """The answer of a sequence that ends.

    Args:
        sequence: Its text is finished by this.
        reason: Why it ends, unless text that was held back holds a stop string.
        arrived: When its request came, as ``time.monotonic()`` counts.
    """
    request = sequence.request
    tail = sequence.text.finish()
    text = sequence.text.text
    now = time.monotonic()
    return GenerateResult(
        id=request.id,
        text=text,
        tail=tail if request.stream else text,
        tokens=tuple(sequence.tokens),
        # Text that was held back at the end may turn out to hold a stop string.
        finish_reason="stop_sequence" if sequence.text.stopped else reason,
        version=request.version,
        prompt_tokens=len(request.token_ids),
        queue_ms=max(0.0, sequence.admitted - arrived) * 1000,
        compute_ms=(now - sequence.admitted) * 1000,
        prompt_logprobs=(None, *sequence.scores) if request.sampling.prompt_logprobs else (),
        prompt_likeliest=((), *sequence.likeliest) if _tells_likeliest(request) else (),
    )


def _tells_likeliest(request: GenerateRequest) -> bool:
    return request.sampling.prompt_logprobs and request.sampling.alternatives > 0


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, as ``generate`` takes them, else the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    for found in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
