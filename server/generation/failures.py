"""Why a request to generate is refused; what both lanes say is in ``server.failures``."""

from __future__ import annotations

from collections.abc import Iterator

from server.messages import Failure, GenerateRequest


def refusal(
    request: GenerateRequest,
    *,
    vocabulary: int,
    max_input_tokens: int | None,
    context_tokens: int,
    capacity_tokens: int,
) -> Failure | None:
    """Why a request can never run, or None.

    Args:
        vocabulary: Token ids of the base.
        max_input_tokens: Of a prompt.
        context_tokens: Of a prompt and its answer.
        capacity_tokens: Whose keys and values the cache could ever hold.
    """
    prompt, new = len(request.token_ids), request.sampling.max_new_tokens
    least_new = 0 if request.sampling.prompt_logprobs else 1
    if prompt < 1 or new < least_new:
        return Failure(
            request.id,
            "invalid_input",
            "Generation needs a prompt of at least one token and room for a new one.",
            found=f"{prompt} prompt tokens, max_new_tokens {new}",
            expected="at least 1 of each, or max_new_tokens 0 with log-probabilities of the prompt",
        )
    least, greatest = min(request.token_ids), max(request.token_ids)
    if least < 0 or greatest >= vocabulary:
        return Failure(
            request.id,
            "invalid_input",
            "The prompt holds a token that the base does not have.",
            found=f"token ids from {least} to {greatest}",
            expected=f"0 to {vocabulary - 1}",
        )
    unknown = next((one for one in _option_ids(request) if not 0 <= one < vocabulary), None)
    if unknown is not None:
        return Failure(
            request.id,
            "invalid_input",
            "The sampling options name a token that the base does not have.",
            found=f"token id {unknown}",
            expected=f"0 to {vocabulary - 1}",
        )
    if max_input_tokens is not None and prompt > max_input_tokens:
        return _too_long(request, f"{prompt} prompt tokens", f"at most {max_input_tokens}")
    if request.tokens > context_tokens or request.kept_tokens > capacity_tokens:
        found = f"{prompt} prompt tokens + {new} new tokens"
        most = min(context_tokens, capacity_tokens + request.tokens - request.kept_tokens)
        return _too_long(request, found, f"at most {most} in all")
    return None


def _option_ids(request: GenerateRequest) -> Iterator[int]:
    """Token ids in the options of a request."""
    options = request.sampling
    yield from (one for one, _ in options.logit_bias)
    yield from options.stop_ids
    yield from options.allowed_ids or ()
    for word in options.bad_words:
        yield from word


def nothing_left(request: GenerateRequest) -> Failure:
    """The request excludes every token that could come next."""
    return Failure(
        request.id,
        "invalid_input",
        "The sampling options leave no token that could come next.",
        found="every token of the vocabulary is excluded",
        expected="at least one that may come",
        fix="Allow more tokens, forbid fewer words, or lower min_tokens.",
    )


def cannot_generate(request_id: str, architecture: str) -> Failure:
    """The base has no causal head."""
    return Failure(
        request_id,
        "task_mismatch",
        "This base does not generate text.",
        found=architecture,
        expected="a causal language model",
        fix="Call /predict or /embed.",
    )


def _too_long(request: GenerateRequest, found: str, expected: str) -> Failure:
    return Failure(
        request.id,
        "input_too_long",
        "The prompt and the tokens to generate do not fit.",
        found=found,
        expected=expected,
        fix="Shorten the prompt or ask for fewer tokens.",
    )
