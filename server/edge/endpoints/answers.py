"""From a resolved target and texts to the worker's answer: what native and OpenAI calls share."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.tasks import Task
from server.edge.admit.slow_work import (
    AT_ONCE_CHARACTERS,
    INPUT_CHARACTERS,
    LONG_CHARACTERS,
    InputsT,
)
from server.edge.endpoints.json_text import AT_ONCE_VALUES, weight, written
from server.edge.endpoints.middleware import Json, RequestContext
from server.edge.endpoints.openai_body import OpenAIBody
from server.edge.link.link import Link
from server.edge.link.ticket import Ticket
from server.edge.service import Service
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.images import Images
from server.inputs.text import Side
from server.messages import (
    TERMINAL,
    EncodeRequest,
    EncodeResult,
    Event,
    Failure,
    GenerateRequest,
    GenerateResult,
    ModelInput,
    Request,
    SamplingOptions,
)

logger = logging.getLogger(__name__)

BASE_VERSION: Final = "base"
SSE: Final = "text/event-stream"
VALUE_BYTES: Final = 64  # what a value of an answer takes in memory, and again as text
T = TypeVar("T")


def context_of(request: HttpRequest) -> RequestContext:
    context = request.scope["hira"]
    assert isinstance(context, RequestContext)
    return context


def resolved(
    request: HttpRequest,
    service: Service,
    names: Sequence[str | None],
    path: str,
    field: str = "adapter",
    *,
    call: str | None = None,
    user: object = None,
) -> Target:
    """`Targets.resolve` for a call, written down in its context.

    Args:
        request: The call; where versions share the requests of a name, its id decides which
            answers, unless it says for which user it is.
        service: Whose names they are.
        names, path, field, call: As `Targets.resolve` takes them.
        user: As OpenAI's bodies have it: whoever asks for one gets the same version every time.

    Raises:
        Refusal: As `Targets.resolve`.
    """
    context = context_of(request)
    sticks = isinstance(user, str) and bool(user)
    key = f"user {user}" if sticks else f"request {context.request_id}"
    target = service.targets.resolve(names, path, field, call=call, key=key)
    context.adapter, context.arm = target.adapter, target.arm
    if sticks and target.arm is not None:  # it has an effect here
        context.ignored = tuple(one for one in context.ignored if one != "user")
    return target


def check_fields(request: HttpRequest, body: OpenAIBody) -> None:
    """Refuse fields that would change the answer and cannot be honoured; note those that are
    ignored, for a header and the log.

    Raises:
        Refusal: unsupported_parameter.
    """
    body.check_supported()
    ignored = body.ignored()
    if ignored:
        context = context_of(request)
        context.ignored = ignored
        logger.debug("request %s: ignored fields %s", context.request_id, ", ".join(ignored))


def target_headers(target: Target) -> dict[str, str]:
    headers = {"X-Adapter": target.shown, "X-Adapter-Version": target.version or BASE_VERSION}
    if target.alias is not None:
        headers["X-Adapter-Alias"] = target.alias
    if target.arm is not None:
        headers["X-Adapter-Arm"] = target.arm
    return headers


def answer_headers(target: Target, *results: EncodeResult | GenerateResult) -> dict[str, str]:
    """Who answered, and the longest that any of the results waited and took."""
    return {
        **target_headers(target),
        "X-Queue-Ms": f"{max(one.queue_ms for one in results):.2f}",
        "X-Compute-Ms": f"{max(one.compute_ms for one in results):.2f}",
    }


def check_inputs(count: int, service: Service, field: str = "inputs") -> None:
    """Raises Refusal when a request holds no input, or more than the server takes."""
    if not 1 <= count <= service.settings.max_inputs:
        raise Refusal.because(
            "invalid_request",
            "The number of inputs is not allowed.",
            found=str(count),
            expected=f"1 to {service.settings.max_inputs}",
            fix="Send several requests; they are batched together anyway.",
            field=field,
        )


def deadline_of(request: HttpRequest, service: Service) -> float:
    """When a call must be done, counted from its arrival, as ``time.monotonic()`` counts."""
    return service.deadline(context_of(request).began, request.headers.get("x-timeout-seconds"))


async def tokenize(  # noqa: PLR0917  # what Service.tokenize takes, after the call
    request: HttpRequest,
    service: Service,
    encoder: InputsT,
    characters: int,
    work: Callable[[InputsT], T],
    field: str = "inputs",
) -> T:
    """`SlowWork.tokenize` for a call: within its deadline, and while its client is there.

    Raises:
        Refusal: What the tokenizer says; overloaded, deadline_exceeded or cancelled.
    """
    deadline = deadline_of(request, service)
    if characters <= AT_ONCE_CHARACTERS:
        return await service.slow_work.tokenize(encoder, characters, work, field, deadline)
    found = asyncio.ensure_future(
        service.slow_work.tokenize(encoder, characters, work, field, deadline)
    )
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((found, left), return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            return found.result()
        raise Refusal.because("cancelled", "The client left.")
    finally:
        found.cancel()
        left.cancel()


async def tokenized(
    request: HttpRequest,
    service: Service,
    inputs: Sequence[Any],
    task: Task,
    *,
    truncation: bool,
    side: Side | None = None,
    field: str = "inputs",
) -> tuple[ModelInput, ...]:
    """Token ids of texts, or pixels of images, whichever the base takes.

    Raises:
        Refusal: In the words of the tokenizer or the image processor; as `tokenize`; overloaded.
    """
    encoder: Any = service.base.inputs
    count, adapter = len(inputs), context_of(request).adapter
    # No work on what would be refused after it: an input has a token at least.
    deadline = deadline_of(request, service)
    service.dispatcher.admission.check_wait("encode", adapter, count, deadline)
    if isinstance(encoder, Images):
        # What they come to is known.
        service.dispatcher.admission.check(
            adapter, count * encoder.tokens, count * encoder.pixel_bytes
        )
        length = LONG_CHARACTERS + 1  # decoding takes its time, however small the file
    else:
        length = sum(len(one) if isinstance(one, str) else sum(map(len, one)) for one in inputs)
        length += INPUT_CHARACTERS * len(inputs)
    found: tuple[ModelInput, ...] = await tokenize(
        request,
        service,
        encoder,
        length,
        lambda one: one.tokenize(inputs, task, truncation=truncation, side=side),
        field,
    )
    return found


async def _left(request: HttpRequest) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextmanager
def watching(request: HttpRequest, link: Link, tickets: Sequence[Ticket]) -> Iterator[None]:
    """Cancel the tickets as soon as the client leaves."""

    async def watch() -> None:
        await _left(request)
        for ticket in tickets:
            link.cancel(ticket)

    task = asyncio.create_task(watch(), name="client-watch")
    try:
        yield
    finally:
        task.cancel()


async def encode(
    request: HttpRequest,
    service: Service,
    target: Target,
    inputs: tuple[ModelInput, ...],
    *,
    task: Task,
    top_k: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> EncodeResult:
    """Send inputs through the encode lane and wait for the answer.

    Raises:
        Refusal: What the dispatcher or the worker says.
    """
    message = EncodeRequest(
        id="",
        task=task,
        adapter=target.adapter,
        version=target.version,
        inputs=inputs,
        top_k=top_k,
        options=options or {},
        submitted=time.monotonic(),
        deadline=deadline_of(request, service),
    )
    with (
        service.dispatcher.admit(message) as ticket,
        watching(request, service.dispatcher, (ticket,)),
    ):
        event = await ticket.next()
    if isinstance(event, Failure):
        raise Refusal.of(event)
    assert isinstance(event, EncodeResult)
    return event


class Generations:
    """Several prompts being continued for one HTTP call; a context that frees what is left.

    Args:
        prompts: Token ids and sampling of each.
        stream: Whether tokens are told one by one.
        field: Where the body has the prompts, for an error.
    """

    def __init__(
        self,
        request: HttpRequest,
        service: Service,
        target: Target,
        prompts: Sequence[tuple[tuple[int, ...], SamplingOptions]],
        *,
        stream: bool,
        field: str = "inputs",
    ) -> None:
        self._request = request
        self._service = service
        self.prompts = tuple(token_ids for token_ids, _ in prompts)
        self._stack = ExitStack()
        self.tickets: list[Ticket] = []
        deadline = deadline_of(request, service)
        messages: list[Request] = [
            GenerateRequest(
                id="",
                adapter=target.adapter,
                version=target.version,
                token_ids=token_ids,
                sampling=sampling,
                stream=stream,
                submitted=time.monotonic(),
                deadline=deadline,
            )
            for token_ids, sampling in prompts
        ]
        service.dispatcher.check_fits(messages, field)
        try:
            for message in messages:
                admitted = service.dispatcher.admit(message)
                self.tickets.append(self._stack.enter_context(admitted))
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()

    async def results(self) -> list[GenerateResult]:
        """Wait for all; the first failure ends the others.

        Raises:
            Refusal: That failure.
        """
        found: list[GenerateResult] = []
        try:
            with watching(self._request, self._service.dispatcher, self.tickets):
                for ticket in self.tickets:
                    event = await ticket.next()
                    while not isinstance(event, TERMINAL):
                        event = await ticket.next()
                    if isinstance(event, Failure):
                        raise Refusal.of(event)
                    assert isinstance(event, GenerateResult)
                    found.append(event)
        finally:
            self.close()
        return found

    async def first(
        self, events: AsyncIterator[list[tuple[int, Event]]]
    ) -> list[tuple[int, Event]]:
        """The first of ``events``, before an answer is begun: a failure still has its own status.

        Raises:
            Refusal: That failure.
        """
        try:
            with watching(self._request, self._service.dispatcher, self.tickets):
                batch = await anext(events)
            for _, event in batch:
                if isinstance(event, Failure):
                    raise Refusal.of(event)
        except BaseException:
            self.close()
            raise
        return batch

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """What comes, as it comes: (prompt, event), those of one step together.

        Ends after the last terminal event, or after the first failure.
        """
        waits = {
            asyncio.ensure_future(ticket.next()): index for index, ticket in enumerate(self.tickets)
        }
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                batch: list[tuple[int, Event]] = []
                for wait in done:
                    index = waits.pop(wait)
                    ticket, event = self.tickets[index], wait.result()
                    batch.append((index, event))
                    while (more := ticket.next_if_there()) is not None:
                        batch.append((index, more))
                    if not isinstance(batch[-1][1], TERMINAL):
                        waits[asyncio.ensure_future(ticket.next())] = index
                yield batch
                if any(isinstance(event, Failure) for _, event in batch):
                    return
        finally:
            for wait in waits:
                wait.cancel()
            self.close()


def sse(payload: object) -> bytes:
    """One server-sent event."""
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of running generations, which end when the response does."""

    def __init__(
        self, chunks: AsyncIterator[bytes], generations: Generations, headers: Mapping[str, str]
    ) -> None:
        super().__init__(chunks, media_type=SSE, headers={**headers, "X-Accel-Buffering": "no"})
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator of the chunks: a client that leaves at once never starts that.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generations.close()


async def json_response(service: Service, content: object, headers: Mapping[str, str]) -> Response:
    """An answer as JSON; a large one is written in a thread."""
    values = weight(content)
    if values <= AT_ONCE_VALUES:
        return Json(content, headers=dict(headers))
    size_bytes = values * VALUE_BYTES
    text = await service.slow_work.run(lambda: written(content), "answers", size_bytes=size_bytes)
    return Response(text, headers=dict(headers), media_type=Json.media_type)
