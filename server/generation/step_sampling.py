"""From logits to tokens inside a step: tensors in, tensors out, and no look at any of them.

The same choice as ``server.generation.sampling`` makes, row by row, with every option a number in a
buffer: repetition penalty, temperature, top-k, top-p, min-p, then a draw at the request's own
point. What needs more than a number of a row is left to the other sampler, by ``option_obstacle``.
"""

from __future__ import annotations

import torch

from server.generation.sampling import far_below
from server.generation.step_buffers import StepBuffers
from server.messages import SamplingOptions


def option_obstacle(options: SamplingOptions, generated: int = 0) -> str | None:
    """Why a request's options cannot be kept in a step; None: they can.

    Args:
        options: Of the request.
        generated: Tokens that its answer has so far.
    """
    if options.grammar is not None:
        return "grammar"
    if options.typical_p < 1.0:
        return "typical_p"
    if options.presence_penalty or options.frequency_penalty:
        return "penalties"
    if options.logit_bias:
        return "logit_bias"
    if options.bad_words or options.allowed_ids is not None or generated < options.min_tokens:
        return "excluded_tokens"
    return "alternatives" if options.alternatives > 20 else None


def takes_best(options: SamplingOptions) -> bool:
    """Whether the best token alone is wanted."""
    sampled = options.do_sample and options.temperature > 0
    return not (sampled or options.logprobs or options.repetition_penalty != 1.0)


def choose_best(logits: torch.Tensor, buffers: StepBuffers) -> None:
    """The best token of each row, and whether its logits were finite.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype.
        buffers: ``told_ids`` and ``told_scores`` are written.
    """
    rows = logits.shape[0]
    best, tokens = logits.float().max(dim=-1)
    buffers.told_ids[0, :rows].copy_(tokens)
    buffers.told_scores[-1, :rows].copy_(torch.isfinite(best))


def choose_all(logits: torch.Tensor, buffers: StepBuffers) -> None:
    """A token of each row by its own options, and what its request may be told.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype.
        buffers: Numbers of the rows; ``told_ids`` and ``told_scores`` are written.
    """
    rows, vocabulary = logits.shape
    raw = logits.float()
    temperature, top_k, top_p, min_p, penalty, sampled, point = buffers.choice(rows)
    best, tokens = raw.max(dim=-1)
    seen = buffers.seen.index_select(0, buffers.seats(rows))
    penalty = penalty.float()[:, None]
    punished = torch.where(raw < 0, raw * penalty, raw / penalty)
    scores = torch.where(seen & (penalty != 1), punished, raw)
    tokens = torch.where(penalty[:, 0] != 1, scores.argmax(dim=-1), tokens)
    drawn = _drawn(scores, temperature.float(), top_k.long(), top_p, min_p.float(), point)
    tokens = torch.where(sampled != 0, drawn, tokens)
    total = raw.logsumexp(-1, keepdim=True)
    likeliest = len(buffers.told_ids) - 1
    values, ids = raw.topk(likeliest, dim=-1)
    buffers.told_ids[0, :rows].copy_(tokens)
    buffers.told_ids[1:, :rows].copy_(ids.t())
    buffers.told_scores[0, :rows].copy_((raw.gather(1, tokens[:, None]) - total)[:, 0])
    buffers.told_scores[1 : 1 + likeliest, :rows].copy_((values - total).t())
    buffers.told_scores[-1, :rows].copy_(torch.isfinite(best))
    assert vocabulary == buffers.vocabulary


def _drawn(  # noqa: PLR0917  # the rows of the buffer, in its order
    scores: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    point: torch.Tensor,
) -> torch.Tensor:
    """One token of each row, int64 ``[rows]``, at its point of what the cuts leave."""
    vocabulary = scores.shape[-1]
    scores = torch.nan_to_num(scores / temperature[:, None])
    ascending = scores.sort(dim=-1).values
    kept = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)
    least = ascending.gather(1, (vocabulary - kept)[:, None])
    ascending = ascending.masked_fill(ascending < least, float("-inf"))
    mass = ascending.softmax(-1).double().cumsum(-1)
    bound = top_p[:, None]
    gone = ((mass <= 1 - bound) & (bound < 1.0)).sum(-1, keepdim=True)
    least = torch.maximum(least, ascending.gather(1, gone.clamp(max=vocabulary - 1)))
    scores = scores.masked_fill(scores < least, float("-inf"))
    scores = scores.masked_fill(far_below(scores, min_p[:, None]), float("-inf"))
    shares = scores.softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(shares, point[:, None] * shares[:, -1:], right=True)
    last = torch.searchsorted(shares, shares[:, -1:].contiguous())
    return torch.minimum(found, last).squeeze(1)
