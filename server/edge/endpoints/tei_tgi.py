"""The native calls: /predict and /embed as text-embeddings-inference has them, /generate and
/generate_stream as text-generation-inference has them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from fastapi import Depends, Request, Response

from adapters.tasks import BY_NAME, ROWS, Task
from server.edge.admit.slow_work import INPUT_CHARACTERS
from server.edge.endpoints.adapter_named import Named, adapter_names
from server.edge.endpoints.answers import (
    EventStream,
    Generations,
    answer_headers,
    check_inputs,
    encode,
    json_response,
    resolved,
    sse,
    target_headers,
    tokenize,
    tokenized,
)
from server.edge.endpoints.body import ValidatedBody, posted, sent_json
from server.edge.endpoints.chat import with_defaults
from server.edge.endpoints.sampling_options import likeliest_first, native_options
from server.edge.endpoints.schemas import (
    EmbedRequest,
    GenerateParameters,
    GenerateRequestBody,
    PredictParameters,
    PredictRequest,
    Truncation,
)
from server.edge.endpoints.structured import asked_of_tgi, settled_grammar
from server.edge.endpoints.word_limit import check_words
from server.edge.service import Service
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.images import Images, looks_like_image
from server.inputs.text import Side
from server.messages import (
    Alternative,
    Event,
    Failure,
    GeneratedToken,
    GenerateResult,
    ModelInput,
    TokenEvent,
)

# Parameters of /predict that some tasks have no use for, and those that have.
TASK_PARAMETERS: Final[dict[str, tuple[Task, ...]]] = {
    name: tuple(row.name for row in ROWS if name in row.parameters)
    for name in dict.fromkeys(
        name for row in ROWS if row.path == "/predict" for name in row.parameters
    )
}

PREDICT_BODY: Any = Depends(posted(PredictRequest))
EMBED_BODY: Any = Depends(posted(EmbedRequest))
GENERATE_BODY: Any = Depends(sent_json(GenerateRequestBody))


class TeiTgi:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def predict(
        self,
        request: Request,
        adapter: str | None = Named,
        sent: ValidatedBody[PredictRequest] = PREDICT_BODY,
    ) -> Response:
        """Classify texts, tokens or images, or fill masks: whatever the adapter was trained for."""
        service, body = self.service, sent.body
        names = (*adapter_names(request, adapter), body.adapter)
        target = resolved(request, service, names, "/predict")
        listed = isinstance(body.inputs, list) if sent.files is None else len(sent.files) > 1
        row = BY_NAME[target.task]
        if row.needs_pair:
            check_contexts(body.inputs)
        parameters = body.parameters
        if body.raw_scores:
            parameters = _with_raw_scores(parameters)
        options = await self._predict_options(request, parameters, target)
        inputs = await self._tokenized(
            request,
            body.inputs,
            sent.files,
            target.task,
            truncation=parameters.truncation or body.truncate,
            side=_side(body),
        )
        if row.needs_mask:
            check_words(
                inputs,
                service.base.texts,
                top_k=body.parameters.top_k,
                targets=options.get("targets"),
            )
        result = await encode(
            request,
            service,
            target,
            inputs,
            task=target.task,
            top_k=body.parameters.top_k,
            options=options,
        )
        outputs = [plain(one) for one in result.outputs]
        return await json_response(
            service,
            outputs if listed else outputs[0],
            answer_headers(target, result),
        )

    async def embed(
        self,
        request: Request,
        adapter: str | None = Named,
        sent: ValidatedBody[EmbedRequest] = EMBED_BODY,
    ) -> Response:
        """Turn texts or images into vectors with the base, or with an adapter's version of it."""
        service, body = self.service, sent.body
        names = (*adapter_names(request, adapter), body.adapter)
        target = resolved(request, service, names, "/embed")
        parameters = body.parameters
        check_prompt_name(body.prompt_name, "prompt_name")
        inputs = await self._tokenized(
            request,
            body.inputs,
            sent.files,
            target.task,
            truncation=parameters.truncation or body.truncate,
            side=_side(body),
        )
        options: dict[str, Any] = {}
        normalize = _agreed(
            parameters.normalize, body.normalize, "parameters.normalize", "normalize"
        )
        if normalize is not None:
            options["normalize"] = normalize
        if parameters.pooling is not None:
            options["pooling"] = parameters.pooling
        result = await encode(request, service, target, inputs, task=target.task, options=options)
        return await json_response(
            service,
            [list(one) for one in result.outputs],
            answer_headers(target, result),
        )

    async def generate(
        self,
        request: Request,
        body: GenerateRequestBody = GENERATE_BODY,
        adapter: str | None = Named,
    ) -> Response:
        """Continue a text."""
        if body.stream:
            return await self.generate_stream(request, body, adapter)
        answer, headers = await self.continued(request, body, adapter)
        return await json_response(self.service, answer, headers)

    async def continued(
        self, request: Request, body: GenerateRequestBody, adapter: str | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The continued text, with details where they were asked for, and the headers."""
        target, generations = await self._begin(request, body, adapter, stream=False)
        result, *others = likeliest_first(await generations.results())
        parameters = body.parameters
        prefill: list[dict[str, Any]] = []
        if parameters.decoder_input_details:
            prefill = await self._prefill(request, generations.prompts[0], result.prompt_logprobs)
        prefix = body.inputs if parameters.return_full_text else ""
        answer: dict[str, Any] = {"generated_text": prefix + result.text}
        if parameters.details or parameters.decoder_input_details:
            answer["details"] = _details(result, parameters, prefill)
            if others:
                answer["details"]["best_of_sequences"] = [
                    {
                        "generated_text": prefix + one.text,
                        **_details(one, parameters, prefill),
                    }
                    for one in others
                ]
        return answer, answer_headers(target, result)

    async def generate_stream(
        self,
        request: Request,
        body: GenerateRequestBody = GENERATE_BODY,
        adapter: str | None = Named,
    ) -> Response:
        """Continue a text, a server-sent event per token."""
        if body.parameters.decoder_input_details:
            raise Refusal.because(
                "unsupported_parameter",
                "The details of a prompt cannot be streamed.",
                found="decoder_input_details=true on a stream",
                expected="decoder_input_details on /generate without stream",
                field="parameters.decoder_input_details",
            )
        if (body.parameters.best_of or 1) > 1:
            raise Refusal.because(
                "unsupported_parameter",
                "The best of several answers cannot be streamed: it is known when all have ended.",
                found=f"best_of={body.parameters.best_of} on a stream",
                expected="best_of on /generate without stream",
                field="parameters.best_of",
            )
        target, generations = await self._begin(request, body, adapter, stream=True)
        events = generations.events()
        first = await generations.first(events)
        prefix = body.inputs if body.parameters.return_full_text else ""
        chunks = _stream(first, events, prefix, body.parameters)
        return EventStream(chunks, generations, target_headers(target))

    async def _tokenized(
        self,
        request: Request,
        given: Any,
        files: tuple[bytes, ...] | None,
        task: Task,
        *,
        truncation: bool,
        side: Side | None = None,
    ) -> tuple[ModelInput, ...]:
        """Token ids of texts, or pixels of images.

        Args:
            request: The call.
            given: The body's ``inputs``.
            files: Uploaded in place of them, or None.

        Raises:
            Refusal: Too many, or in the words of the tokenizer or the image processor.
        """
        service = self.service
        one_by_one = given if isinstance(given, list) else [given]
        inputs: list[Any] = one_by_one if files is None else list(files)
        check_inputs(len(inputs), service)
        if not isinstance(service.base.inputs, Images) and (
            files is not None
            or any(isinstance(one, str) and looks_like_image(one) for one in inputs)
        ):
            raise Refusal.because(
                "invalid_input",
                "This base takes texts, not images.",
                found="an image",
                expected="text",
                fix="Ask a server whose base is a vision transformer.",
                field="inputs",
            )
        return await tokenized(request, service, inputs, task, truncation=truncation, side=side)

    async def _predict_options(
        self, request: Request, parameters: PredictParameters, target: Target
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, tasks in TASK_PARAMETERS.items():
            value = getattr(parameters, name)
            if value is None:
                continue
            if target.task not in tasks:
                raise Refusal.because(
                    "unsupported_parameter",
                    f"{name} has no meaning for {target.task}.",
                    found=f"{name}={str(value)[:80]}",
                    expected="an adapter for " + " or ".join(tasks),
                    field=f"parameters.{name}",
                )
            options[name] = value
        words = options.get("targets")
        if words is not None:
            text = self.service.base.texts
            options["targets"] = await tokenize(
                request,
                self.service,
                text,
                sum(len(str(word)) + INPUT_CHARACTERS for word in words),
                lambda one: one.targets(words),
                "parameters.targets",
            )
        return options

    async def _begin(
        self, request: Request, body: GenerateRequestBody, adapter: str | None, *, stream: bool
    ) -> tuple[Target, Generations]:
        service, parameters = self.service, body.parameters
        names = (*adapter_names(request, adapter), body.adapter, parameters.adapter_id)
        target = resolved(request, service, names, "/generate")
        check_new_tokens(parameters.max_new_tokens, service, "parameters.max_new_tokens")
        token_ids = await tokenize(
            request,
            service,
            service.base.texts,
            len(body.inputs),
            lambda text: text.tokenize_prompt(
                body.inputs,
                max_new_tokens=parameters.max_new_tokens,
                truncation=parameters.truncation or parameters.truncate is not None,
            ),
        )
        if parameters.truncate is not None:
            token_ids = token_ids[-parameters.truncate :]
        asked = asked_of_tgi(parameters.grammar, "parameters.grammar")
        grammar = await settled_grammar(request, service, asked)
        said, copies = _said(parameters), parameters.best_of or 1
        check_inputs(copies, service, "parameters.best_of")
        prompts = [
            (
                token_ids,
                with_defaults(
                    replace(native_options(parameters, stream=stream, copy=copy), grammar=grammar),
                    target,
                    said,
                ),
            )
            for copy in range(copies)
        ]
        if copies > 1 and not prompts[0][1].do_sample:
            raise Refusal.because(
                "invalid_request",
                "The best of several answers needs sampling: without it all are the same.",
                found=f"best_of={copies} without sampling",
                expected="do_sample, or a sampling parameter such as temperature",
                field="parameters.best_of",
            )
        return target, Generations(request, service, target, prompts, stream=stream)

    async def _prefill(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        logprobs: tuple[float | None, ...],
    ) -> list[dict[str, Any]]:
        """TGI's list of the prompt's tokens."""
        pieces = await tokenize(
            request,
            self.service,
            self.service.base.texts,
            INPUT_CHARACTERS * len(token_ids),
            lambda text: text.spell(token_ids),
        )
        return [
            {"id": token, "text": piece.text, "logprob": logprob, "special": piece.special}
            for token, piece, logprob in zip(token_ids, pieces, logprobs, strict=True)
        ]


def check_prompt_name(name: str | None, field: str) -> None:
    """Raises Refusal where a prompt is named: a base's prompts are not read, so there is none."""
    if name is not None:
        raise Refusal.because(
            "unsupported_parameter",
            "There is no prompt of this name.",
            found=name[:80],
            expected="no prompt_name",
            fix="Put the prompt's text before the inputs.",
            field=field,
        )


def _side(body: Truncation) -> Side | None:
    """Where inputs are cut, if the body says so; else where the tokenizer cuts."""
    return body.side if "truncation_direction" in body.model_fields_set else None


def _agreed(one: bool | None, other: bool | None, field: str, other_field: str) -> bool | None:
    """A value that a body may give in two places.

    Raises:
        Refusal: invalid_request where both are there and differ.
    """
    if one is not None and other is not None and one != other:
        raise Refusal.because(
            "invalid_request",
            f"{field} and {other_field} contradict each other.",
            found=f"{one} and {other}",
            expected="one of them",
            field=other_field,
        )
    return other if one is None else one


def _with_raw_scores(parameters: PredictParameters) -> PredictParameters:
    """The parameters with TEI's ``raw_scores`` in our word for it.

    Raises:
        Refusal: invalid_request where another function was asked for.
    """
    if parameters.function_to_apply not in (None, "none"):
        raise Refusal.because(
            "invalid_request",
            "raw_scores and function_to_apply contradict each other.",
            found=f"raw_scores and function_to_apply={parameters.function_to_apply}",
            expected="one of them",
            field="raw_scores",
        )
    return parameters.model_copy(update={"function_to_apply": "none"})


def check_contexts(inputs: Any) -> None:
    """Raises Refusal where a question has no context that its answer could be found in."""
    for index, one in enumerate(inputs if isinstance(inputs, list) else [inputs]):
        if not isinstance(one, tuple) or not one[1].strip():
            raise Refusal.because(
                "invalid_input",
                f"Input {index} is a question without a context.",
                found="one text" if isinstance(one, str) else "an empty context",
                expected="pairs of texts: [[question, context], ...]",
                fix="Send the text that holds the answer as the second of a pair.",
                field="inputs",
            )


def check_new_tokens(wanted: int, service: Service, field: str) -> None:
    """Raises Refusal when more is asked for than one request may generate."""
    most = min(service.settings.max_new_tokens, service.base.texts.max_tokens)
    if wanted > most:
        raise Refusal.because(
            "invalid_request",
            "More new tokens are asked for than a request may have.",
            found=str(wanted),
            expected=f"at most {most}",
            field=field,
        )


def _said(parameters: GenerateParameters) -> set[str]:
    """What a request does not leave to defaults; what switches sampling on decides about it."""
    said = {name for name in parameters.model_fields_set if getattr(parameters, name) is not None}
    return said | ({"do_sample"} if parameters.samples else set())


def _details(
    result: GenerateResult, parameters: GenerateParameters, prefill: list[dict[str, Any]]
) -> dict[str, Any]:
    """TGI's account of one answer."""
    details: dict[str, Any] = {
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.tokens),
        "seed": parameters.seed,
        "prefill": prefill,
        "tokens": [_as_token(one) for one in result.tokens],
    }
    if parameters.top_n_tokens:
        details["top_tokens"] = [
            [_as_token(it) for it in one.alternatives] for one in result.tokens
        ]
    return details


def _as_token(token: GeneratedToken | Alternative) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }


async def _stream(
    first: list[tuple[int, Event]],
    rest: AsyncIterator[list[tuple[int, Event]]],
    prefix: str,
    parameters: GenerateParameters,
) -> AsyncIterator[bytes]:
    """TGI's events. The last token waits for the end that came with it, and carries it."""
    index, tops = 0, bool(parameters.top_n_tokens)
    batch: list[tuple[int, Event]] | None = first
    last: TokenEvent | None = None
    while batch is not None:
        held: TokenEvent | None = None
        for _, event in batch:
            if isinstance(event, TokenEvent):
                if held is not None:
                    yield _token(index, held, tops=tops)
                index, held, last = index + 1, event, event
            elif isinstance(event, GenerateResult):
                yield _end(
                    index,
                    held or last,
                    event,
                    new=held is not None,
                    prefix=prefix,
                    seed=parameters.seed,
                    tops=tops,
                )
                return
            elif isinstance(event, Failure):
                if held is not None:
                    yield _token(index, held, tops=tops)
                problem = Refusal.of(event).problem()
                yield sse(problem)
                return
        if held is not None:
            yield _token(index, held, tops=tops)
        batch = await anext(rest, None)


def _tops(event: TokenEvent | None, *, tops: bool) -> dict[str, Any]:
    """The likeliest tokens in a token's place, where they were asked for."""
    return {"top_tokens": [_as_token(one) for one in event.alternatives]} if tops and event else {}


def _token(index: int, event: TokenEvent, *, tops: bool) -> bytes:
    return sse(
        {
            "index": index,
            "token": {
                "id": event.token_id,
                "text": event.text,
                "logprob": event.logprob,
                "special": event.special,
            },
            **_tops(event, tops=tops),
            "generated_text": None,
            "details": None,
        }
    )


def _end(
    index: int,
    shown: TokenEvent | None,
    result: GenerateResult,
    *,
    new: bool,
    prefix: str,
    seed: int | None,
    tops: bool,
) -> bytes:
    """The last event: the last token, unless it went out before, with the whole text."""
    text = shown.text if shown is not None and new else ""
    return sse(
        {
            "index": index,
            "token": {
                "id": shown.token_id if shown else 0,
                "text": text + result.tail,
                "logprob": shown.logprob if shown else 0.0,
                "special": bool(shown and shown.special and not result.tail),
            },
            **_tops(shown, tops=tops),
            "generated_text": prefix + result.text,
            "details": {
                "finish_reason": result.finish_reason,
                "generated_tokens": len(result.tokens),
                "input_length": result.prompt_tokens,
                "seed": seed,
            },
        }
    )


def plain(output: Any) -> Any:
    """An engine's output as JSON has it."""
    return list(output) if isinstance(output, tuple) else output
