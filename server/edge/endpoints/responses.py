"""POST /v1/responses: OpenAI's newer call for a conversation, in texts and calls of functions.

It is answered as a chat is, and written down in its own shape: a list of items, each a message or a
call, whole or as the events that OpenAI's clients know. Nothing is kept of it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Depends, Request, Response

from server.edge.endpoints.answers import (
    EventStream,
    Generations,
    answer_headers,
    json_response,
    sse,
    target_headers,
)
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.chat import with_defaults
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.openai_format import ToolReading
from server.edge.endpoints.schemas_responses import ResponseRequest, ResponseToolChoice
from server.edge.endpoints.structured import ANY_OBJECT, AskedGrammar, settled_grammar
from server.edge.endpoints.tool_calls import (
    AnswerPart,
    CallBegun,
    MoreArguments,
    ToolCallReader,
    Words,
)
from server.edge.endpoints.tool_grammar import asked_of_tools
from server.errors import Refusal
from server.messages import Event, Failure, GenerateResult, SamplingOptions, TokenEvent

Status = Literal["in_progress", "completed", "incomplete"]
RESPONSE_BODY: Any = Depends(sent_json(ResponseRequest))


class Responses:
    """The endpoint; one object per server.

    Args:
        openai: Whose way from messages to a prompt it goes.
    """

    def __init__(self, openai: OpenAI) -> None:
        self.openai = openai

    async def create(self, request: Request, body: ResponseRequest = RESPONSE_BODY) -> Response:
        """Continue a conversation."""
        calls, service = self.openai, self.openai.service
        target = calls.target(request, body, "/v1/responses")
        used = body.used_tools()
        several = body.parallel_tool_calls is not False
        reading = await calls.reading(used, target, several=several)
        prompt, wanted = await calls.conversation(
            request,
            target,
            body.messages(),
            asked=body.max_output_tokens,
            limit="max_output_tokens",
            field="input",
            tools=used,
        )
        asked = asked_of_tools(
            body.functions, body.choice, reading, service.base.texts.id_of, _asked(body)
        )
        temperature = 1.0 if body.temperature is None else body.temperature
        sampling = SamplingOptions(
            max_new_tokens=wanted,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=body.top_p or 1.0,
            shown_ids=calls.shown_marks(reading),
            grammar=await settled_grammar(request, service, asked),
        )
        said = {name for name in body.model_fields_set if getattr(body, name) is not None}
        if "temperature" in said:
            said.add("do_sample")
        each = [(prompt, with_defaults(sampling, target, said))]
        stream = bool(body.stream)
        generations = Generations(request, service, target, each, stream=stream, field="input")
        answer = WrittenResponse(body, calls.answering(body, target), reading)
        if not stream:
            (result,) = await generations.results()
            headers = answer_headers(target, result)
            return await json_response(service, answer.whole(result), headers)
        events = generations.events()
        first = await generations.first(events)
        return EventStream(answer.events(first, events), generations, target_headers(target))


@dataclass
class OutputItem:
    """One item of a response, as far as it has come.

    Args:
        index: Of the item.
        kind: A message of the assistant, or a call of a function.
        name: Of the function.
        call_id: Of the call, by which its result will be known.
        text: Of the message, or the arguments of the call.
    """

    index: int
    kind: Literal["message", "function_call"]
    name: str = ""
    call_id: str = ""
    text: str = ""
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def id(self) -> str:
        return f"{'msg' if self.kind == 'message' else 'fc'}_{self.number}"

    def plain(self, status: Status) -> dict[str, Any]:
        """As OpenAI writes it down."""
        head = {"type": self.kind, "id": self.id, "status": status}
        if self.kind == "message":
            return {**head, "role": "assistant", "content": [self.part()]}
        called = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        return {**head, **called}

    def empty(self) -> dict[str, Any]:
        """Before anything has come."""
        own: dict[str, Any] = {"content": []} if self.kind == "message" else {"arguments": ""}
        return {**self.plain("in_progress"), **own}

    def part(self) -> dict[str, Any]:
        """The one part of a message."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


@dataclass
class WrittenResponse:
    """One response as it is written down.

    Args:
        body: What was asked.
        model: Who answers.
        reading: How calls of functions are read from the answer; None: none are.
    """

    body: ResponseRequest
    model: str
    reading: ToolReading | None = None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    items: list[OutputItem] = field(default_factory=list)
    sent: int = 0  # events

    def __post_init__(self) -> None:
        reading = self.reading
        self._reader: ToolCallReader | None = None if reading is None else reading.reader()

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        """A finished response."""
        self._push(result.text)
        self._close()
        return self._ended(result)

    async def events(
        self,
        first: list[tuple[int, Event]],
        rest: AsyncIterator[list[tuple[int, Event]]],
    ) -> AsyncIterator[bytes]:
        """The events of a stream, numbered, in OpenAI's order."""
        begun = {**self._head("in_progress"), "output": [], "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        batch: list[tuple[int, Event]] | None = first
        while batch is not None:
            for _, event in batch:
                if isinstance(event, TokenEvent):
                    for one in self._push(event.text):
                        yield one
                elif isinstance(event, GenerateResult):
                    for one in (*self._push(event.tail), *self._close()):
                        yield one
                    if self.items:
                        for one in self._done(self.items[-1], _response_status(event)):
                            yield one
                    response = self._ended(event)
                    yield self._event(f"response.{response['status']}", response=response)
                elif isinstance(event, Failure):
                    yield self._failed(Refusal.of(event))
            batch = await anext(rest, None)

    def _push(self, text: str) -> list[bytes]:
        """Take in more of the answer's text; the events that tell of it."""
        if not text:
            return []
        if self._reader is None:
            return self._add([Words(text)])
        return self._add(self._reader.push(text))

    def _close(self) -> list[bytes]:
        """Take in that the answer has ended; one without any text is an empty message."""
        told = [] if self._reader is None else self._add(self._reader.finish())
        return told if self.items else [*told, *self._begin(OutputItem(0, "message"))]

    def _add(self, parts: Sequence[AnswerPart]) -> list[bytes]:
        told: list[bytes] = []
        for part in parts if self.reading is None else self.reading.given(parts):
            last = self.items[-1] if self.items else None
            match part:
                case Words(text):
                    if last is None or last.kind != "message":
                        told += self._begin(last := OutputItem(len(self.items), "message"))
                    last.text += text
                    place = {**self._place(last), "content_index": 0}
                    kind = "response.output_text.delta"
                    told.append(self._event(kind, **place, delta=text, logprobs=[]))
                case CallBegun(_, name):
                    assert self.reading is not None
                    index, call_id = len(self.items), self.reading.new_id()
                    told += self._begin(OutputItem(index, "function_call", name, call_id))
                case MoreArguments(_, text):
                    assert last is not None
                    last.text += text
                    kind = "response.function_call_arguments.delta"
                    told.append(self._event(kind, **self._place(last), delta=text))
        return told

    def _begin(self, item: OutputItem) -> list[bytes]:
        """A further item; the one before it has ended."""
        told = self._done(self.items[-1], "completed") if self.items else []
        self.items.append(item)
        kind = "response.output_item.added"
        told.append(self._event(kind, output_index=item.index, item=item.empty()))
        if item.kind == "message":
            place = {**self._place(item), "content_index": 0}
            told.append(self._event("response.content_part.added", **place, part=item.part()))
        return told

    def _done(self, item: OutputItem, status: Status) -> list[bytes]:
        """An item has ended."""
        place = self._place(item)
        if item.kind == "message":
            within = {**place, "content_index": 0}
            done = {**within, "text": item.text, "logprobs": []}
            told = [
                self._event("response.output_text.done", **done),
                self._event("response.content_part.done", **within, part=item.part()),
            ]
        else:
            done = {**place, "name": item.name, "arguments": item.text}
            told = [self._event("response.function_call_arguments.done", **done)]
        plain = item.plain(status)
        kind = "response.output_item.done"
        return [*told, self._event(kind, output_index=item.index, item=plain)]

    def _ended(self, result: GenerateResult) -> dict[str, Any]:
        """The response when all of its items are there; the last is what was cut."""
        status = _response_status(result)
        tokens = (result.prompt_tokens, len(result.tokens))
        usage = {
            "input_tokens": tokens[0],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens[1],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(tokens),
        }
        output = [one.plain("completed") for one in self.items[:-1]]
        output += [one.plain(status) for one in self.items[-1:]]
        return {**self._head(status), "output": output, "usage": usage}

    def _failed(self, refusal: Refusal) -> bytes:
        """The stream ends here; what came of it stands."""
        error = refusal.openai()["error"]
        told = {"code": error["code"], "message": error["message"]}
        failed = {**self._head("failed"), "error": told, "output": [], "usage": None}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self.sent = self.sent, self.sent + 1
        payload = {"type": kind, "sequence_number": number, **content}
        return f"event: {kind}\n".encode() + sse(payload)

    def _place(self, item: OutputItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.index}

    def _head(self, status: Status | Literal["failed"]) -> dict[str, Any]:
        body = self.body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        choice: Any = body.tool_choice or "auto"
        if isinstance(choice, ResponseToolChoice):
            choice = {"type": choice.type, "name": choice.name}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice,
            "tools": [one.plain() for one in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
        }


def _response_status(result: GenerateResult) -> Status:
    return "incomplete" if result.finish_reason == "length" else "completed"


def _asked(body: ResponseRequest) -> AskedGrammar | None:
    """What the answer is held to; None for any text."""
    match body.format.type:
        case "json_schema":
            return AskedGrammar("json_schema", body.format.schema_, "text.format.schema")
        case "json_object":
            return AskedGrammar("json_schema", ANY_OBJECT, "text.format")
        case _:
            return None
