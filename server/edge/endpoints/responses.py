"""POST /v1/responses: OpenAI's newer call for a conversation, text in and text out.

It is answered as a chat is, and written down in its own shape: one message, whole or as the events
that OpenAI's clients know. Nothing is kept of it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
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
from server.edge.endpoints.schemas_responses import ResponseRequest
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
        prompt, wanted = await calls.conversation(
            request,
            target,
            body.messages(),
            asked=body.max_output_tokens,
            limit="max_output_tokens",
            field="input",
        )
        temperature = 1.0 if body.temperature is None else body.temperature
        sampling = SamplingOptions(
            max_new_tokens=wanted,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=body.top_p or 1.0,
        )
        said = {name for name in body.model_fields_set if getattr(body, name) is not None}
        if "temperature" in said:
            said.add("do_sample")
        each = [(prompt, with_defaults(sampling, target, said))]
        stream = bool(body.stream)
        generations = Generations(request, service, target, each, stream=stream, field="input")
        answer = WrittenResponse(body, calls.answering(body, target))
        if not stream:
            (result,) = await generations.results()
            headers = answer_headers(target, result.queue_ms, result.compute_ms)
            return await json_response(service, answer.whole(result), headers)
        events = generations.events()
        first = await generations.first(events)
        return EventStream(answer.events(first, events), generations, target_headers(target))


@dataclass
class WrittenResponse:
    """One response as it is written down.

    Args:
        body: What was asked.
        model: Who answers.
    """

    body: ResponseRequest
    model: str
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    message_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    sent: int = 0  # events

    def whole(self, result: GenerateResult) -> dict[str, Any]:
        """A finished response."""
        status: Status = "incomplete" if result.finish_reason == "length" else "completed"
        tokens = (result.prompt_tokens, len(result.tokens))
        usage = {
            "input_tokens": tokens[0],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens[1],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(tokens),
        }
        output = [self._message(result.text, status)]
        return {**self._head(status), "output": output, "usage": usage}

    async def events(
        self,
        first: list[tuple[int, Event]],
        rest: AsyncIterator[list[tuple[int, Event]]],
    ) -> AsyncIterator[bytes]:
        """The events of a stream, numbered, in OpenAI's order."""
        begun = {**self._head("in_progress"), "output": [], "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        empty = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=empty)
        part = self._part("")
        yield self._event("response.content_part.added", **self._place(), part=part)
        batch: list[tuple[int, Event]] | None = first
        while batch is not None:
            for _, event in batch:
                if isinstance(event, TokenEvent):
                    if event.text:
                        yield self._delta(event.text)
                elif isinstance(event, GenerateResult):
                    if event.tail:
                        yield self._delta(event.tail)
                    for one in self._ends(event):
                        yield one
                elif isinstance(event, Failure):
                    yield self._failed(Refusal.of(event))
            batch = await anext(rest, None)

    def _ends(self, result: GenerateResult) -> list[bytes]:
        response = self.whole(result)
        status, (item,) = response["status"], response["output"]
        done = {**self._place(), "text": result.text, "logprobs": []}
        return [
            self._event("response.output_text.done", **done),
            self._event(
                "response.content_part.done", **self._place(), part=self._part(result.text)
            ),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=response),
        ]

    def _failed(self, refusal: Refusal) -> bytes:
        """The stream ends here; what came of it stands."""
        error = refusal.openai()["error"]
        told = {"code": error["code"], "message": error["message"]}
        failed = {**self._head("failed"), "error": told, "output": [], "usage": None}
        return self._event("response.failed", response=failed)

    def _delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self.sent = self.sent, self.sent + 1
        payload = {"type": kind, "sequence_number": number, **content}
        return f"event: {kind}\n".encode() + sse(payload)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def _message(self, text: str, status: Status) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.message_id,
            "status": status,
            "role": "assistant",
            "content": [self._part(text)],
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _head(self, status: Status | Literal["failed"]) -> dict[str, Any]:
        body = self.body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
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
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }
