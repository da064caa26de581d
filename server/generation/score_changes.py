"""What a request changes in the logits of its own row before temperature and cuts.

In the order of transformers' ``generate``: bias of single tokens, repetition penalty, then OpenAI's
frequency and presence penalties, which transformers has not, then what must not come: bad words,
ends before the least number of tokens, all but the allowed tokens. Each row is changed by itself,
so nothing here depends on the rest of a batch. The draw is left to ``server.generation.sampling``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from server.messages import SamplingOptions

_OUT = float("-inf")


class ScoreChanges:
    """The changes of one request, and the tokens that they depend on.

    Args:
        options: As the request asked.
        prompt: Its tokens.
        ends: Tokens that would end its answer; those that the vocabulary has not count for nothing.
    """

    def __init__(
        self, options: SamplingOptions, prompt: Sequence[int], ends: Collection[int] = ()
    ) -> None:
        self._options = options
        self._ends = tuple(sorted(ends))
        self._prompt_tokens = len(prompt)
        self._length = len(prompt)
        # A single bad word that ends the answer is none, as transformers has it.
        words = [one for one in options.bad_words if len(one) > 1 or one[0] not in ends]
        self._banned = [one[0] for one in words if len(one) == 1]
        self._banned_after = [(one[:-1], one[-1]) for one in words if len(one) > 1]
        self._kept_tail = max((len(one) for one in words), default=1) - 1
        self._tail = list(prompt[-self._kept_tail :]) if self._kept_tail else []
        self._history = torch.empty(0, dtype=torch.long)
        if options.repetition_penalty != 1.0 or self._counts:
            self._history = torch.zeros(self._length + options.max_new_tokens, dtype=torch.long)
            self._history[: self._length] = torch.tensor(prompt, dtype=torch.long)
        self._of_device: dict[str, torch.Tensor] = {}

    @staticmethod
    def wanted(options: SamplingOptions) -> bool:
        """Whether a request changes anything."""
        return bool(
            options.repetition_penalty != 1.0
            or options.presence_penalty
            or options.frequency_penalty
            or options.logit_bias
            or options.bad_words
            or options.min_tokens
            or options.allowed_ids is not None
        )

    @property
    def _counts(self) -> bool:
        return bool(self._options.presence_penalty or self._options.frequency_penalty)

    @property
    def history(self) -> torch.Tensor:
        """Prompt and generated tokens, [n]; kept only for penalties."""
        return self._history[: self._length]

    def note(self, token_id: int) -> None:
        """Remember a token that was taken."""
        if self._length < len(self._history):
            self._history[self._length] = token_id
        self._length += 1
        if self._kept_tail:
            self._tail = [*self._tail, token_id][-self._kept_tail :]

    def apply(self, scores: torch.Tensor) -> None:
        """Change a row in place.

        Args:
            scores: float32 ``[vocabulary]``; a token that must not come gets -inf, which may be
                all of them.
        """
        options = self._options
        if options.logit_bias:
            ids = self._ids("biased", [one for one, _ in options.logit_bias], scores)
            scores[ids] += torch.tensor([by for _, by in options.logit_bias], device=scores.device)
        if options.repetition_penalty != 1.0:
            self._punish_repetition(scores)
        if self._counts:
            self._punish_by_count(scores)
        if self._banned:
            scores[self._ids("banned", self._banned, scores)] = _OUT
        for before, last in self._banned_after:
            if tuple(self._tail[-len(before) :]) == before:
                scores[last] = _OUT
        if self._length - self._prompt_tokens < options.min_tokens:
            ends = [one for one in self._ends if one < len(scores)]
            scores[self._ids("ends", ends, scores)] = _OUT
        if options.allowed_ids is not None:
            scores.masked_fill_(self._excluded(options.allowed_ids, scores), _OUT)

    def _punish_repetition(self, scores: torch.Tensor) -> None:
        """score / p where positive, score * p where negative, once for every token seen."""
        seen = self.history.to(scores.device)
        penalty = self._options.repetition_penalty
        found = scores[seen]
        scores[seen] = torch.where(found < 0, found * penalty, found / penalty)

    def _punish_by_count(self, scores: torch.Tensor) -> None:
        """score - frequency * count - presence, for every token that was generated."""
        counts = torch.bincount(self.history[self._prompt_tokens :])
        ids = counts.nonzero().squeeze(1)
        by = counts[ids].float() * self._options.frequency_penalty + self._options.presence_penalty
        scores[ids.to(scores.device)] -= by.to(scores.device)

    def _ids(self, name: str, ids: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        found = self._of_device.get(name)
        if found is None or found.device != scores.device:
            found = torch.tensor(ids, dtype=torch.long, device=scores.device)
            self._of_device[name] = found
        return found

    def _excluded(self, allowed: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """bool ``[vocabulary]``: true where a token is not allowed."""
        found = self._of_device.get("excluded")
        if found is None or found.device != scores.device:
            found = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            found[torch.tensor(allowed, dtype=torch.long, device=scores.device)] = False
            self._of_device["excluded"] = found
        return found
