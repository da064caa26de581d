"""From logits to tokens: each request by its own options, all of them in one batch.

The order of the steps is that of transformers' ``generate``: repetition penalty, temperature,
top-k, top-p, draw. Every draw takes one number from the request's own generator, on the CPU, so a
seed gives the same tokens whatever else is in the batch. Log-probabilities are those of the model
before any of these steps, as OpenAI and vLLM report them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.messages import SamplingOptions

# Without top-k, top-p looks for its nucleus among this many best tokens before it sorts them all.
NUCLEUS_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; ``finite`` is False when the logits were not, and then it means nothing."""

    token_id: int
    logprob: float | None
    finite: bool


class TokenChooser:
    """What one request needs to remember to choose its tokens.

    Args:
        options: As the request asked.
        prompt: Its tokens; the repetition penalty counts them.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self.sampled = options.do_sample and options.temperature > 0
        self.penalized = options.repetition_penalty != 1.0
        self._generator: torch.Generator | None = None
        self._length = len(prompt)
        self._history = torch.empty(0, dtype=torch.long)
        if self.penalized:
            self._history = torch.zeros(self._length + options.max_new_tokens, dtype=torch.long)
            self._history[: self._length] = torch.tensor(prompt, dtype=torch.long)

    @property
    def history(self) -> torch.Tensor:
        """Prompt and generated tokens, [n]; kept only for a repetition penalty."""
        return self._history[: self._length]

    def note(self, token_id: int) -> None:
        """Remember a token that was chosen."""
        if self.penalized and self._length < len(self._history):
            self._history[self._length] = token_id
            self._length += 1

    def draw(self) -> float:
        """The next number of this request's own sequence, in [0, 1)."""
        if self._generator is None:
            self._generator = torch.Generator()
            if self.options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.options.seed % (1 << 63))
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: torch.Tensor, choosers: Sequence[TokenChooser]) -> list[Choice]:
    """Choose one token per row.

    Args:
        logits: [n, vocabulary], of the model, any float dtype; left as they are.
        choosers: One per row. Each sampled one is asked for one number.

    Returns:
        One choice per row, in order.
    """
    raw = logits.float()
    best, chosen = raw.max(dim=-1)
    finite = torch.isfinite(best)
    tokens = chosen.tolist()
    penalized = [i for i, c in enumerate(choosers) if c.penalized]
    scores = raw
    if penalized:
        scores = raw.clone()
        for i in penalized:
            _penalize(scores[i], choosers[i])
            if not choosers[i].sampled:
                tokens[i] = int(scores[i].argmax())
    sampled = [i for i, c in enumerate(choosers) if c.sampled]
    if sampled:
        rows = scores if len(sampled) == len(choosers) else scores[sampled]
        drawn = _sample(rows, [choosers[i] for i in sampled])
        for i, token in zip(sampled, drawn, strict=True):
            tokens[i] = token
    logprobs: list[float | None] = [None] * len(tokens)
    asked = [i for i, c in enumerate(choosers) if c.options.logprobs]
    if asked:
        rows = raw if len(asked) == len(tokens) else raw[asked]
        ids = torch.tensor([tokens[i] for i in asked], device=raw.device)[:, None]
        taken = (rows.gather(1, ids) - rows.logsumexp(-1, keepdim=True)).squeeze(1).tolist()
        for i, value in zip(asked, taken, strict=True):
            logprobs[i] = value
    return [Choice(*row) for row in zip(tokens, logprobs, finite.tolist(), strict=True)]


def _penalize(scores: torch.Tensor, chooser: TokenChooser) -> None:
    """score / p where positive, score * p where negative, once for every token seen."""
    seen = chooser.history.to(scores.device)
    penalty = chooser.options.repetition_penalty
    found = scores[seen]
    scores[seen] = torch.where(found < 0, found * penalty, found / penalty)


def _sample(scores: torch.Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """Draw one token per row of ``scores`` ([n, vocabulary], penalized already)."""
    temperature = torch.tensor([c.options.temperature for c in choosers], device=scores.device)
    scores = torch.nan_to_num(scores / temperature[:, None])
    uniform = [c.draw() for c in choosers]
    vocabulary = scores.shape[-1]
    whole = [i for i, c in enumerate(choosers) if not _truncates(c.options, vocabulary)]
    tokens = [0] * len(choosers)
    if whole:
        probabilities = scores[whole].softmax(-1)
        drawn = _invert(probabilities, [uniform[i] for i in whole])
        for i, token in zip(whole, drawn.tolist(), strict=True):
            tokens[i] = token
    pending = [i for i in range(len(choosers)) if i not in set(whole)]
    width = NUCLEUS_TOKENS
    while pending:
        options = [choosers[i].options for i in pending]
        ids, probabilities, enough = truncate(scores[pending], options, width)
        drawn = ids.gather(1, _invert(probabilities, [uniform[i] for i in pending])[:, None])
        for i, token in zip(pending, drawn.squeeze(1).tolist(), strict=True):
            tokens[i] = token
        pending = [i for i, ok in zip(pending, enough.tolist(), strict=True) if not ok]
        width = vocabulary
    return tokens


def _truncates(options: SamplingOptions, vocabulary: int) -> bool:
    return 0 < options.top_k < vocabulary or options.top_p < 1.0


def truncate(
    scores: torch.Tensor, options: Sequence[SamplingOptions], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply top-k, then top-p, looking at the ``width`` best tokens (more where top-k says so).

    Args:
        scores: [n, vocabulary] after penalty and temperature.
        options: One per row.
        width: Most tokens to consider for a row without top-k.

    Returns:
        Token ids [n, w] in ascending order; their probabilities, 0 for those cut off, not
        normalized; and for each row whether ``width`` was enough.
    """
    vocabulary = scores.shape[-1]
    device = scores.device
    asked_k = [o.top_k if 0 < o.top_k < vocabulary else 0 for o in options]
    wide = min(vocabulary, max([*asked_k, width if 0 in asked_k else 1]))
    values, ids = scores.topk(wide, dim=-1)
    kept = torch.tensor([k or wide for k in asked_k], device=device)[:, None]
    values = values.masked_fill(torch.arange(wide, device=device) >= kept, float("-inf"))
    has_k = torch.tensor([k > 0 for k in asked_k], device=device)[:, None]
    total = torch.where(
        has_k, values.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True)
    )
    probabilities = (values - total).exp()
    top_p = torch.tensor([o.top_p for o in options], device=device)[:, None]
    mass = probabilities.cumsum(-1)
    # A token stays while what is likelier than it does not yet reach top_p; the first always does.
    before = mass - probabilities
    beyond = (before >= top_p) & (top_p < 1.0)
    beyond[:, 0] = False
    enough = (has_k | (mass[:, -1:] >= top_p) | (wide == vocabulary)).squeeze(1)
    probabilities = probabilities.masked_fill(beyond, 0.0)
    # In the order of ids, as in a row that is not truncated: then a last-bit difference between two
    # close tokens moves a boundary by as little, instead of swapping two intervals.
    order = ids.argsort(dim=-1)
    return ids.gather(1, order), probabilities.gather(1, order), enough


def _invert(probabilities: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """The first column of each row whose cumulative share exceeds the uniform number: [n]."""
    shares = probabilities.double().cumsum(-1)
    points = torch.tensor(uniform, dtype=torch.float64, device=shares.device)[:, None]
    found = torch.searchsorted(shares, points * shares[:, -1:], right=True)
    return found.squeeze(1).clamp_(max=shares.shape[-1] - 1)
