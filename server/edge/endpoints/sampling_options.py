"""How tokens are to be chosen, from the fields of each surface to one set of options."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from server.edge.admit.slow_work import INPUT_CHARACTERS
from server.edge.endpoints.answers import tokenize
from server.edge.endpoints.schemas import GenerateParameters
from server.edge.endpoints.schemas_openai import Sampling
from server.edge.service import Service
from server.errors import Refusal
from server.messages import GenerateResult, Grammar, SamplingOptions

SEEDS = 1 << 63


def native_options(
    parameters: GenerateParameters, *, stream: bool, copy: int = 0
) -> SamplingOptions:
    """text-generation-inference's parameters.

    Args:
        parameters: Of the body.
        stream: Whether tokens are told one by one.
        copy: Which of ``best_of`` answers: they differ, and in the same way every time.
    """
    told = parameters.details or parameters.decoder_input_details or stream
    seed = parameters.seed
    return SamplingOptions(
        max_new_tokens=parameters.max_new_tokens,
        do_sample=parameters.samples,
        temperature=parameters.temperature or 1.0,
        top_p=parameters.top_p or 1.0,
        top_k=parameters.top_k or 0,
        typical_p=parameters.typical_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        stop=tuple(parameters.stop),
        seed=None if seed is None else (seed + copy) % SEEDS,
        logprobs=told or (parameters.best_of or 1) > 1,
        alternatives=parameters.top_n_tokens or 0 if told else 0,
        ignore_eos=parameters.ignore_eos_token,
        prompt_logprobs=parameters.decoder_input_details,
    )


def openai_options(
    body: Sampling,
    wanted: int,
    *,
    bad_words: tuple[tuple[int, ...], ...] = (),
    shown: tuple[int, ...] = (),
    copy: int = 0,
    logprobs: bool = False,
    alternatives: int = 0,
    prompt_logprobs: bool = False,
    grammar: Grammar | None = None,
) -> SamplingOptions:
    """OpenAI's fields, and those that other servers of its shape have beside them.

    Args:
        body: Of the call.
        wanted: Tokens to generate at most.
        bad_words: As token ids.
        shown: Special tokens that are part of the text.
        copy: Which of several answers to one prompt.
        logprobs, alternatives, prompt_logprobs, grammar: As ``SamplingOptions`` has them.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    stop = body.stop or ()
    allowed = body.allowed_token_ids
    return SamplingOptions(
        max_new_tokens=wanted,
        grammar=grammar,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        typical_p=body.typical_p or 1.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((body.logit_bias or {}).items()),
        bad_words=bad_words,
        allowed_ids=None if allowed is None else tuple(allowed),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(body.stop_token_ids or ()),
        # Copies of one prompt must differ, and do so in the same way every time.
        seed=None if body.seed is None else (body.seed % SEEDS + copy) % SEEDS,
        logprobs=logprobs,
        alternatives=alternatives,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        shown_ids=shown,
        prompt_logprobs=prompt_logprobs,
    )


def check_options(body: Sampling, wanted: int, vocabulary: int | None) -> None:
    """Raises Refusal for options that no answer of ``wanted`` tokens could keep.

    Args:
        body: Of the call.
        wanted: Tokens to generate at most.
        vocabulary: Token ids of the base, where it is known here.
    """
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise Refusal.because(
            "invalid_request",
            "More tokens are asked for at least than at most.",
            found=f"min_tokens {body.min_tokens}, at most {wanted} tokens",
            expected=f"min_tokens of at most {wanted}",
            field="min_tokens",
        )
    if vocabulary is None:
        return
    named = {
        "logit_bias": body.logit_bias,
        "stop_token_ids": body.stop_token_ids,
        "allowed_token_ids": body.allowed_token_ids,
    }
    for field, ids in named.items():
        if ids and (max(ids) >= vocabulary or min(ids) < 0):
            raise Refusal.because(
                "invalid_request",
                f"{field} names a token that the base does not have.",
                found=f"token ids from {min(ids)} to {max(ids)}",
                expected=f"ids from 0 to {vocabulary - 1}",
                field=field,
            )


async def bad_words_of(
    request: HttpRequest, service: Service, words: Sequence[str] | None
) -> tuple[tuple[int, ...], ...]:
    """The token ids of words that must not come.

    Raises:
        Refusal: A word that the vocabulary cannot spell; as ``tokenize``.
    """
    if not words:
        return ()
    return await tokenize(
        request,
        service,
        service.base.texts,
        sum(map(len, words)) + INPUT_CHARACTERS * len(words),
        lambda text: text.word_ids(words),
        "bad_words",
    )


def likeliest_first(results: Sequence[GenerateResult]) -> list[GenerateResult]:
    """Answers to one prompt by the mean log-probability of their tokens, the largest first.

    As OpenAI's and text-generation-inference's ``best_of`` choose; equal ones stay in order.
    """
    return sorted(results, key=_mean_logprob, reverse=True)


def _mean_logprob(result: GenerateResult) -> float:
    values = [one.logprob for one in result.tokens if one.logprob is not None]
    return sum(values) / len(values) if values else 0.0
