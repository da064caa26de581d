"""The calls under /v1, as OpenAI's clients expect them. ``model`` names an adapter, or the base."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import Depends, Request, Response

from server.edge.admit.slow_work import INPUT_CHARACTERS
from server.edge.endpoints.answers import (
    VALUE_BYTES,
    EventStream,
    Generations,
    answer_headers,
    check_fields,
    check_inputs,
    encode,
    json_response,
    resolved,
    target_headers,
    tokenize,
    tokenized,
)
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.chat import chat_prompt, template_for, with_defaults
from server.edge.endpoints.json_text import AT_ONCE_VALUES
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.model_facts import ModelFacts
from server.edge.endpoints.openai_body import ModelNamed
from server.edge.endpoints.openai_format import (
    ChatFormat,
    CompletionFormat,
    Format,
    ToolReading,
    stream_chunks,
)
from server.edge.endpoints.sampling_options import (
    bad_words_of,
    check_options,
    likeliest_first,
    openai_options,
)
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.schemas_openai import CompletionRequest, EmbeddingRequest, Sampling
from server.edge.endpoints.structured import asked_of_openai, settled_grammar
from server.edge.endpoints.tei_tgi import check_new_tokens
from server.edge.endpoints.tool_calls import CALL_MARKS, FORMS, MARKERS, form_of
from server.edge.endpoints.tool_grammar import asked_of_tools
from server.edge.service import Service
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.text import Text
from server.messages import GenerateResult, TokenizedInput
from server.metrics import BASE_LABEL

if TYPE_CHECKING:
    from adapters.registry.records import AdapterRecord

DEFAULT_TOKENS = 16
DEFAULT_CHAT_TOKENS = 256
MAX_MODELS = 10_000
# What clients that have no model to name write in its place.
PLACEHOLDERS = frozenset({"tgi", "tei", "dummy", "default", "none", "-", "_"})
COMPLETION_BODY: Any = Depends(sent_json(CompletionRequest))
CHAT_BODY: Any = Depends(sent_json(ChatRequest))
EMBEDDING_BODY: Any = Depends(sent_json(EmbeddingRequest))


class OpenAI:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def models(self, request: Request) -> Response:
        """The base and every adapter with its aliases, of what the key is for."""
        base, may_ask = self.service.base, self.service.targets.may_ask
        own = [self._model(base.name, base.created, None)] if may_ask(BASE_LABEL) else []
        adapters = [
            (name, one)
            for one in self.service.names.listed(fitting=True)
            for name in (one.name, *one.aliases)
            if may_ask(name)
        ]
        listed = [
            self._model(name, one.created.timestamp(), one) for name, one in adapters[:MAX_MODELS]
        ]
        return await json_response(self.service, {"object": "list", "data": own + listed}, {})

    async def model(self, request: Request, model: str) -> Response:
        """One of them."""
        base = self.service.base
        if self.service.base.answers_to(model):
            self.service.targets.check_scope(model, "model")
            return Json(self._model(base.name, base.created, None))
        record = self.service.targets.served_record(model, "model")
        return Json(self._model(model, record.created.timestamp(), record))

    async def completions(
        self, request: Request, body: CompletionRequest = COMPLETION_BODY
    ) -> Response:
        """Continue one or more prompts."""
        target = self.target(request, body, "/v1/completions")
        wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        check_new_tokens(wanted, self.service, "max_tokens")
        scores = bool(body.echo) and (body.logprobs is not None or wanted == 0)
        _check_scoring(body, wanted, scores=scores)
        prompts = await self._prompts(request, body.prompt, wanted)
        tokens = INPUT_CHARACTERS * sum(map(len, prompts))
        shape = CompletionFormat(
            f"cmpl-{uuid.uuid4().hex}",
            int(time.time()),
            self.answering(body, target),
            await self._echoed(request, body, prompts) if body.echo else None,
            body.logprobs is not None,
            alternatives := body.logprobs or 0,
            await tokenize(
                request,
                self.service,
                self.service.base.texts,
                tokens,
                lambda text: [text.spell(ids) for ids in prompts],
                "prompt",
            )
            if scores and not alternatives
            else None,
            fingerprint=self.fingerprint,
        )
        return await self._generate(
            request,
            body,
            target,
            prompts=prompts,
            wanted=wanted,
            shape=shape,
            field="prompt",
            scores=scores,
        )

    async def chat_completions(self, request: Request, body: ChatRequest = CHAT_BODY) -> Response:
        """Continue a conversation, written out with the adapter's chat template or the base's."""
        target = self.target(request, body, "/v1/chat/completions")
        several = body.parallel_tool_calls is not False
        reading = await self.reading(body.used_tools(), target, several=several)
        limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        prompt, wanted = await self.conversation(
            request,
            target,
            [message.plain() for message in body.messages],
            asked=body.max_completion_tokens or body.max_tokens,
            limit=limit,
            tools=body.used_tools(),
            variables=body.variables,
        )
        shape = ChatFormat(
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            self.answering(body, target),
            bool(body.logprobs),
            body.top_logprobs or 0,
            reading,
            fingerprint=self.fingerprint,
        )
        return await self._generate(
            request, body, target, prompts=[prompt], wanted=wanted, shape=shape, field="messages"
        )

    async def conversation(
        self,
        request: Request,
        target: Target,
        messages: Sequence[Mapping[str, Any]],
        *,
        asked: int | None,
        limit: str,
        field: str = "messages",
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[int, ...], int]:
        """The prompt of a conversation as token ids, and how many tokens are to be generated.

        Args:
            request: The call.
            target: Whom it is for.
            messages, tools, variables: As ``chat_prompt`` takes them.
            asked: Tokens to generate at most; None for what is left of the context, so that a long
                conversation is not refused, up to a usual number.
            limit, field: Where the body has those, and the messages.

        Raises:
            Refusal: As ``chat_prompt``; too many tokens, or in the tokenizer's words.
        """
        service = self.service
        text = service.base.texts
        if asked is not None:
            check_new_tokens(asked, service, limit)
        written = await chat_prompt(
            request, service, target, messages, tools=tools, variables=variables, field=field
        )
        prompt = await tokenize(
            request,
            service,
            text,
            len(written) + INPUT_CHARACTERS,
            lambda one: one.tokenize_prompt(
                written, max_new_tokens=asked or 1, special_tokens=False
            ),
            field,
        )
        wanted = asked or min(
            target.generation.get("max_new_tokens", DEFAULT_CHAT_TOKENS),
            service.settings.max_new_tokens,
            text.max_tokens - len(prompt),
        )
        return prompt, wanted

    async def reading(
        self, tools: Sequence[Mapping[str, Any]], target: Target, *, several: bool
    ) -> ToolReading | None:
        """How calls of tools are read from the answers; None: there are none.

        Args:
            tools: As templates take them.
            target: Whose template shows how calls are written.
            several: Whether an answer may have more than one.

        Raises:
            Refusal: unsupported_parameter where it is not known how this model writes them.
        """
        if not tools:
            return None
        setting = self.service.settings.tool_format
        _, template = await template_for(self.service, target, with_tools=True)
        form = form_of(template.text) if setting == "auto" else setting
        if form is None:
            raise Refusal.because(
                "unsupported_parameter",
                f"How the model of {target.shown} writes calls of tools is not known.",
                found="a chat template that shows no form that is read here",
                expected=", ".join(FORMS),
                fix="Start the server with --tool-format, or use a template with tools.",
                field="tools",
            )
        names = tuple(one["function"]["name"] for one in tools)
        marks = tuple(one for one in CALL_MARKS if form == "mistral" and one in template.text)
        return ToolReading(form, names, several, marks)

    async def embeddings(
        self, request: Request, body: EmbeddingRequest = EMBEDDING_BODY
    ) -> Response:
        """Turn texts into vectors of length 1."""
        target = self.target(request, body, "/v1/embeddings")
        given = body.input
        service = self.service
        truncation = bool(body.truncation)
        if isinstance(given, str) or (given and isinstance(given[0], str)):
            texts = [given] if isinstance(given, str) else [str(one) for one in given]
            check_inputs(len(texts), service, "input")
            inputs = await tokenized(
                request,
                service,
                texts,
                "feature-extraction",
                truncation=truncation,
                field="input",
            )
        else:
            most = service.base.texts.max_tokens
            if isinstance(service.base.inputs, Text):
                most = service.base.inputs.max_tokens
            lists = self._token_lists(given, "input", None if truncation else most)
            inputs = tuple(TokenizedInput(ids[:most]) for ids in lists)
        result = await encode(
            request,
            service,
            target,
            inputs,
            task="feature-extraction",
            options={"normalize": True},
        )
        vectors: list[list[float]] = [list(one) for one in result.outputs]
        coded = body.encoding_format == "base64"
        answer = {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _base64(vector) if coded else vector,
                }
                for index, vector in enumerate(vectors)
            ],
            "model": self.answering(body, target),
            "usage": {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens},
        }
        return await json_response(service, answer, answer_headers(target, result))

    async def _generate(
        self,
        request: Request,
        body: Sampling,
        target: Target,
        *,
        prompts: Sequence[tuple[int, ...]],
        wanted: int,
        shape: Format,
        field: str,
        scores: bool = False,
    ) -> Response:
        copies = body.n or 1
        tries = _tries(body, copies)
        stream = bool(body.stream)
        said = {name for name in body.model_fields_set if getattr(body, name) is not None}
        if "temperature" in said:
            said.add("do_sample")
        check_inputs(len(prompts) * tries, self.service, "best_of" if tries > copies else "n")
        check_options(body, wanted, self.service.base.texts.vocab_size)
        bad_words = await bad_words_of(request, self.service, body.bad_words)
        shown = self.shown_marks(shape.tools if isinstance(shape, ChatFormat) else None)
        asked = asked_of_openai(body)
        if isinstance(body, ChatRequest) and isinstance(shape, ChatFormat):
            id_of = self.service.base.texts.id_of
            asked = asked_of_tools(body.tools or (), body.tool_choice, shape.tools, id_of, asked)
        grammar = await settled_grammar(request, self.service, asked)
        each = [
            (
                prompt,
                with_defaults(
                    openai_options(
                        body,
                        wanted,
                        bad_words=bad_words,
                        shown=shown,
                        grammar=grammar,
                        copy=copy,
                        logprobs=shape.logprobs or tries > copies,
                        alternatives=shape.alternatives,
                        prompt_logprobs=scores,
                    ),
                    target,
                    said,
                ),
            )
            for prompt in prompts
            for copy in range(tries)
        ]
        # What asks for too much: the prompts, or the answers to each.
        asks = "best_of" if tries > copies else "n" if copies > 1 else field
        generations = Generations(request, self.service, target, each, stream=stream, field=asks)
        if not stream:
            results = made = await generations.results()
            if tries > copies:
                results = [
                    one
                    for start in range(0, len(made), tries)
                    for one in likeliest_first(made[start : start + tries])[:copies]
                ]
            if scores and shape.alternatives and isinstance(shape, CompletionFormat):
                likeliest = [one.prompt_likeliest for one in results[::copies]]
                count = sum(map(len, prompts)) * (1 + shape.alternatives)
                spelled = await tokenize(
                    request,
                    self.service,
                    self.service.base.texts,
                    INPUT_CHARACTERS * count,
                    lambda text: [
                        text.spell(ids, others)
                        for ids, others in zip(prompts, likeliest, strict=True)
                    ],
                    "prompt",
                )
                shape = replace(shape, spelled=spelled)
            told = await self._told(shape, results, copies)
            return await json_response(
                self.service,
                {**told, "usage": usage(made, tries)},
                answer_headers(target, *made),
            )
        events = generations.events()
        first = await generations.first(events)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks: AsyncIterator[bytes] = stream_chunks(
            shape, first, events, choices=len(each), copies=copies, with_usage=with_usage
        )
        return EventStream(chunks, generations, target_headers(target))

    def shown_marks(self, reading: ToolReading | None) -> tuple[int, ...]:
        """Special tokens that must be seen in an answer: those around calls of tools."""
        if reading is None:
            return ()
        text = self.service.base.texts
        marks = (*MARKERS[reading.form], *reading.marks)
        ids = (text.id_of(mark) for mark in marks if mark)
        return tuple(one for one in ids if one is not None)

    async def _told(
        self, shape: Format, results: Sequence[GenerateResult], copies: int
    ) -> dict[str, Any]:
        """The answer as values; one with many log-probabilities is put together in a thread."""
        tokens = sum(len(one.tokens) + len(one.prompt_logprobs) for one in results)
        values = tokens * (1 + shape.alternatives)
        if values <= AT_ONCE_VALUES:
            return shape.answer(results, copies)
        return await self.service.slow_work.run(
            lambda: shape.answer(results, copies), "answers", size_bytes=values * VALUE_BYTES
        )

    def target(self, request: Request, body: ModelNamed, verb: str) -> Target:
        """Whom ``model`` means; refuses what would change the answer and is not there."""
        check_fields(request, body)
        path = "/embed" if isinstance(body, EmbeddingRequest) else "/generate"
        named = request.query_params.getlist("adapter")
        model = body.model
        if self._names_nobody(model):
            model = None if named else self.service.default_model
        names = [model, *named]
        user = getattr(body, "user", None)
        return resolved(request, self.service, names, path, "model", call=verb, user=user)

    @property
    def fingerprint(self) -> str:
        """Which base computes, as OpenAI's clients and TGI's want it told."""
        return f"fp_{self.service.base.signature.digest[:12]}"

    def answering(self, body: ModelNamed, target: Target) -> str:
        """Who answers, for the answer: as the request has it, if it names anybody."""
        model = body.model
        if model is None or self._names_nobody(model):
            return target.adapter or self.service.base.name
        return model

    def _names_nobody(self, model: str | None) -> bool:
        """Whether there is no model, or what a client writes that has none."""
        return not model or (
            model in PLACEHOLDERS
            and not (self.service.names.knows(model) and self.service.targets.may_ask(model))
            and not self.service.base.answers_to(model)
        )

    def _model(self, name: str, created: float, record: AdapterRecord | None) -> dict[str, Any]:
        base = self.service.base
        parent = None if record is None else base.name
        facts = ModelFacts.of(self.service, record)
        return {
            "id": name,
            "object": "model",
            "created": int(created),
            "owned_by": "hira-server",
            "parent": parent,
            "root": parent or name,
            "task": facts.task,
            "labels": facts.labels,
            "context": facts.context,
            "chat": facts.chat,
            "alias_of": None if record is None or record.name == name else record.name,
        }

    async def _prompts(
        self, request: Request, prompt: str | list[str] | list[int] | list[list[int]], wanted: int
    ) -> list[tuple[int, ...]]:
        text = self.service.base.texts
        if isinstance(prompt, str):
            texts = [prompt]
        elif prompt and isinstance(prompt[0], str):
            texts = [str(one) for one in prompt]
        else:
            most = text.max_tokens
            return self._token_lists(prompt, "prompt", most, room=wanted)
        check_inputs(len(texts), self.service, "prompt")
        return await tokenize(
            request,
            self.service,
            text,
            sum(map(len, texts)) + INPUT_CHARACTERS * len(texts),
            lambda text: [text.tokenize_prompt(one, max_new_tokens=wanted) for one in texts],
            "prompt",
        )

    def _token_lists(
        self, given: Any, field: str, most: int | None, *, room: int = 0
    ) -> list[tuple[int, ...]]:
        """Prompts that come as token ids: one list, or a list of lists.

        Args:
            given: As the body has them.
            field: Where the body has them.
            most: Tokens that each may have, with ``room``; None for any number.
            room: Tokens to be added.
        """
        lists = [given] if given and isinstance(given[0], int) else list(given)
        check_inputs(len(lists), self.service, field)
        vocabulary = self.service.base.texts.vocab_size or 1 << 62
        for ids in lists:
            if not ids or min(ids) < 0 or max(ids) >= vocabulary:
                raise Refusal.because(
                    "invalid_input",
                    "A list of token ids is empty or holds an id that the base does not have.",
                    expected=f"ids from 0 to {vocabulary - 1}",
                    field=field,
                )
            if most is not None and len(ids) + room > most:
                raise Refusal.because(
                    "input_too_long",
                    "The prompt and the tokens asked for do not fit the context.",
                    found=f"{len(ids)} + {room} tokens",
                    expected=f"at most {most}",
                    field=field,
                    limit_tokens=most,
                )
        return [tuple(ids) for ids in lists]

    async def _echoed(
        self, request: Request, body: CompletionRequest, prompts: Sequence[tuple[int, ...]]
    ) -> list[str]:
        prompt = body.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], str):
            return [str(one) for one in prompt]
        return await tokenize(
            request,
            self.service,
            self.service.base.texts,
            sum(map(len, prompts)) + INPUT_CHARACTERS * len(prompts),
            lambda text: [text.decode(ids) for ids in prompts],
            "prompt",
        )


def _tries(body: Sampling, copies: int) -> int:
    """How many answers to each prompt are generated, of which ``copies`` are given.

    Raises:
        Refusal: Fewer than are to be given, or more on a stream.
    """
    asked = body.best_of if isinstance(body, CompletionRequest) else None
    tries = copies if asked is None else asked
    if tries < copies:
        raise Refusal.because(
            "invalid_request",
            "Fewer answers are to be generated than given.",
            found=f"best_of {tries}, n {copies}",
            expected=f"best_of of at least {copies}",
            field="best_of",
        )
    if tries > copies and body.stream:
        raise Refusal.because(
            "unsupported_parameter",
            "The best of several answers cannot be streamed: it is known when all have ended.",
            found=f"best_of {tries} with n {copies} on a stream",
            expected="no stream, or best_of equal to n",
            field="best_of",
        )
    return tries


def _check_scoring(body: CompletionRequest, wanted: int, *, scores: bool) -> None:
    """Raises Refusal where nothing is asked for, or scores of a prompt in a stream."""
    if wanted == 0 and not body.echo:
        raise Refusal.because(
            "invalid_request",
            "Nothing is asked for.",
            found="max_tokens 0 without echo",
            expected="max_tokens of at least 1, or echo",
            field="max_tokens",
        )
    if scores and body.stream:
        raise Refusal.because(
            "unsupported_parameter",
            "The log-probabilities of a prompt cannot be streamed.",
            found="echo with logprobs, or with max_tokens 0, on a stream",
            expected="no stream",
            field="stream",
        )


def usage(results: Sequence[GenerateResult], copies: int) -> dict[str, int]:
    """Tokens of one call; a prompt counts once however many answers it has."""
    prompt = sum(one.prompt_tokens for one in results[::copies])
    completion = sum(len(one.tokens) for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
