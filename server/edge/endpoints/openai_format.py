"""How OpenAI writes down completions and chats, whole and in chunks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.edge.endpoints.answers import sse
from server.edge.endpoints.tool_calls import (
    AnswerPart,
    CallBegun,
    MoreArguments,
    ToolCallReader,
    ToolForm,
    Words,
)
from server.errors import Refusal
from server.inputs.detokenize import Piece
from server.messages import (
    Alternative,
    Event,
    Failure,
    GeneratedToken,
    GenerateResult,
    TokenEvent,
)


class Format(Protocol):
    """One kind of answer: whole, and as the chunks of a stream."""

    @property
    def logprobs(self) -> bool: ...

    @property
    def alternatives(self) -> int: ...

    def answer(self, results: Sequence[GenerateResult], copies: int) -> dict[str, Any]: ...

    def head(self) -> dict[str, Any]:
        """What every chunk begins with."""

    def opening(self, choice: int, copies: int) -> dict[str, Any] | None:
        """A choice's first chunk, before any token."""

    def tokens(self, choice: int, event: TokenEvent) -> list[dict[str, Any]]:
        """The chunks of a token that shows a text, or whose log-probability is told."""

    def ends(self, choice: int, result: GenerateResult) -> list[dict[str, Any]]:
        """A choice's last chunks."""


def generated(event: TokenEvent) -> GeneratedToken:
    """The token of an event, with its own text, which may be held back or shown already."""
    text = event.text if event.spelling is None else event.spelling
    return GeneratedToken(event.token_id, text, event.logprob, event.special, event.alternatives)


def finish_reason(result: GenerateResult) -> str:
    return "length" if result.finish_reason == "length" else "stop"


@dataclass(frozen=True)
class CompletionFormat:
    id: str
    created: int
    model: str
    echoed: Sequence[str] | None
    logprobs: bool
    alternatives: int = 0
    spelled: Sequence[Sequence[Piece]] | None = None  # the tokens of each prompt that is scored
    fingerprint: str = ""  # of the base, as ``system_fingerprint``
    offsets: dict[int, int] = field(
        default_factory=dict
    )  # of the next tokens of a stream's choices

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def answer(self, results: Sequence[GenerateResult], copies: int) -> dict[str, Any]:
        choices = []
        for index, result in enumerate(results):
            echoed = self.echoed[index // copies] if self.echoed is not None else ""
            choices.append(
                {
                    "index": index,
                    "text": echoed + result.text,
                    "logprobs": self._whole(result, index // copies, len(echoed)),
                    "finish_reason": finish_reason(result),
                }
            )
        return {**self.head(), "choices": choices}

    def opening(self, choice: int, copies: int) -> dict[str, Any] | None:
        if self.echoed is None:
            return None
        echoed = self.echoed[choice // copies]
        self.offsets[choice] = len(echoed)
        return self._choice(choice, echoed, None, None)

    def tokens(self, choice: int, event: TokenEvent) -> list[dict[str, Any]]:
        token, start = generated(event), self.offsets.get(choice, 0)
        self.offsets[choice] = start + len(token.text)
        return [self._choice(choice, event.text, self._logprobs((token,), start), None)]

    def ends(self, choice: int, result: GenerateResult) -> list[dict[str, Any]]:
        return [self._choice(choice, result.tail, None, finish_reason(result))]

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _whole(self, result: GenerateResult, prompt: int, start: int) -> dict[str, Any] | None:
        """Log-probabilities of an answer, after those of its prompt where they were asked for."""
        told = self._logprobs(result.tokens, start)
        if told is None or self.spelled is None:
            return told
        pieces, offsets, at = self.spelled[prompt], [], 0
        for piece in pieces:
            offsets.append(at)
            at += 0 if piece.special else len(piece.text)
        return {
            "tokens": [piece.text for piece in pieces] + told["tokens"],
            "token_logprobs": [*result.prompt_logprobs, *told["token_logprobs"]],
            "text_offset": offsets + told["text_offset"],
            "top_logprobs": self._top(
                [
                    (piece.text, logprob, piece.alternatives)
                    for piece, logprob in zip(pieces, result.prompt_logprobs, strict=True)
                ]
                + [(token.text, token.logprob, token.alternatives) for token in result.tokens]
            ),
        }

    def _top(
        self, tokens: Sequence[tuple[str, float | None, Sequence[Alternative]]]
    ) -> list[dict[str, float] | None] | None:
        """Of each token: itself and the likeliest in its place, by their texts."""
        if not self.alternatives:
            return None
        return [
            None
            if logprob is None
            else {text: logprob, **{one.text: one.logprob for one in others if one.text != text}}
            for text, logprob, others in tokens
        ]

    def _logprobs(self, tokens: Sequence[GeneratedToken], start: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets, at = [], start
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "text_offset": offsets,
            "top_logprobs": self._top(
                [(token.text, token.logprob, token.alternatives) for token in tokens]
            ),
        }


@dataclass(frozen=True, slots=True)
class ToolReading:
    """How calls of tools are read from answers.

    Args:
        form: How they are written.
        names: Of the functions.
        several: Whether more than the first call of an answer is given.
        marks: Which ``CALL_MARKS`` the template shows between a name and its arguments.
    """

    form: ToolForm
    names: tuple[str, ...]
    several: bool = True
    marks: tuple[str, ...] = ()

    def reader(self) -> ToolCallReader:
        return ToolCallReader(self.form, self.names)

    def new_id(self) -> str:
        """An id for a call. Templates of Mistral's take no others than these nine characters."""
        made = uuid.uuid4().hex
        return made[:9] if self.form == "mistral" else f"call_{made[:24]}"

    def given(self, parts: Sequence[AnswerPart]) -> list[AnswerPart]:
        """Without the calls that were not asked for."""
        return [one for one in parts if self.several or isinstance(one, Words) or not one.index]


@dataclass(frozen=True)
class ChatFormat:
    id: str
    created: int
    model: str
    logprobs: bool
    alternatives: int = 0
    tools: ToolReading | None = None
    readers: dict[int, ToolCallReader] = field(default_factory=dict)  # of the choices of a stream
    fingerprint: str = ""  # of the base, as ``system_fingerprint``

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def answer(self, results: Sequence[GenerateResult], copies: int) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": (message := self._message(result.text)),
                "logprobs": self._logprobs([one for one in result.tokens if not one.special]),
                "finish_reason": _finish(result, called="tool_calls" in message),
            }
            for index, result in enumerate(results)
        ]
        return {**self.head(), "object": "chat.completion", "choices": choices}

    def opening(self, choice: int, copies: int) -> dict[str, Any] | None:
        return self._choice(choice, {"role": "assistant", "content": ""}, None, None)

    def tokens(self, choice: int, event: TokenEvent) -> list[dict[str, Any]]:
        logprobs = None if event.special else self._logprobs([generated(event)])
        if not event.text and logprobs is None:
            return []
        if self.tools is None:
            return [self._choice(choice, {"content": event.text}, logprobs, None)]
        reader = self.readers.setdefault(choice, self.tools.reader())
        deltas = self._deltas(self.tools, reader.push(event.text))
        if logprobs is not None and not deltas:
            deltas = [{}]
        told = [logprobs, *[None] * len(deltas)]
        return [
            self._choice(choice, delta, its, None) for delta, its in zip(deltas, told, strict=False)
        ]

    def ends(self, choice: int, result: GenerateResult) -> list[dict[str, Any]]:
        if self.tools is None:
            delta = {"content": result.tail} if result.tail else {}
            return [self._choice(choice, delta, None, finish_reason(result))]
        reader = self.readers.setdefault(choice, self.tools.reader())
        deltas = self._deltas(self.tools, reader.push(result.tail) + reader.finish())
        finish = _finish(result, called=reader.calls > 0)
        return [
            *(self._choice(choice, delta, None, None) for delta in deltas),
            self._choice(choice, {}, None, finish),
        ]

    def _message(self, text: str) -> dict[str, Any]:
        """The answer of the assistant, with the calls that are in its text."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.tools is None:
            return message
        reader = self.tools.reader()
        words: list[str] = []
        calls: list[dict[str, Any]] = []
        for part in self.tools.given(reader.push(text) + reader.finish()):
            match part:
                case Words(more):
                    words.append(more)
                case CallBegun(_, name):
                    function = {"name": name, "arguments": ""}
                    calls.append(
                        {"id": self.tools.new_id(), "type": "function", "function": function}
                    )
                case MoreArguments(index, more):
                    calls[index]["function"]["arguments"] += more
        if calls:
            message |= {"content": "".join(words) or None, "tool_calls": calls}
        return message

    def _deltas(self, tools: ToolReading, parts: Sequence[AnswerPart]) -> list[dict[str, Any]]:
        """Parts of an answer as OpenAI streams them."""
        found: list[dict[str, Any]] = []
        for part in tools.given(parts):
            match part:
                case Words(text):
                    found.append({"content": text})
                case CallBegun(index, name):
                    call = {"index": index, "id": tools.new_id(), "type": "function"}
                    function = {"name": name, "arguments": ""}
                    found.append({"tool_calls": [{**call, "function": function}]})
                case MoreArguments(index, text):
                    more = {"index": index, "function": {"arguments": text}}
                    found.append({"tool_calls": [more]})
        return found

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                **_told(token.text, token.logprob),
                "top_logprobs": [_told(one.text, one.logprob) for one in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content}


def _finish(result: GenerateResult, *, called: bool) -> str:
    """A call that was cut ends for the length, as OpenAI's does."""
    reason = finish_reason(result)
    return "tool_calls" if called and reason == "stop" else reason


def _told(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


async def stream_chunks(
    shape: Format,
    first: list[tuple[int, Event]],
    rest: AsyncIterator[list[tuple[int, Event]]],
    *,
    choices: int,
    copies: int,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The whole stream, its last line ``[DONE]`` always, also after an error."""

    def chunk(choice: dict[str, Any]) -> bytes:
        extra = {"usage": None} if with_usage else {}
        return sse({**shape.head(), "choices": [choice], **extra})

    for index in range(choices):
        opening = shape.opening(index, copies)
        if opening is not None:
            yield chunk(opening)
    prompt = completion = 0
    failed = False
    batch: list[tuple[int, Event]] | None = first
    while batch is not None:
        for index, event in batch:
            if isinstance(event, TokenEvent):
                if event.text or shape.logprobs:
                    for piece in shape.tokens(index, event):
                        yield chunk(piece)
            elif isinstance(event, GenerateResult):
                for piece in shape.ends(index, event):
                    yield chunk(piece)
                completion += len(event.tokens)
                prompt += event.prompt_tokens if index % copies == 0 else 0
            elif isinstance(event, Failure):
                yield sse(Refusal.of(event).openai())
                failed = True
        batch = await anext(rest, None)
    if with_usage and not failed:
        totals = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        yield sse({**shape.head(), "choices": [], "usage": totals})
    yield sse("[DONE]")
