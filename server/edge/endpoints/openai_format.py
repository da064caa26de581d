"""How OpenAI writes down completions and chats, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.edge.endpoints.answers import sse
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

    def token(self, choice: int, event: TokenEvent) -> dict[str, Any]: ...

    def end(self, choice: int, result: GenerateResult) -> dict[str, Any]: ...


def generated(event: TokenEvent) -> GeneratedToken:
    """The token of an event, with the text that it shows."""
    return GeneratedToken(
        event.token_id, event.text, event.logprob, event.special, event.alternatives
    )


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
        return self._choice(choice, self.echoed[choice // copies], None, None)

    def token(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        token = generated(event)
        return self._choice(choice, event.text, self._logprobs((token,), 0), None)

    def end(self, choice: int, result: GenerateResult) -> dict[str, Any]:
        return self._choice(choice, result.tail, None, finish_reason(result))

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


@dataclass(frozen=True)
class ChatFormat:
    id: str
    created: int
    model: str
    logprobs: bool
    alternatives: int = 0
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
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs([one for one in result.tokens if not one.special]),
                "finish_reason": finish_reason(result),
            }
            for index, result in enumerate(results)
        ]
        return {**self.head(), "object": "chat.completion", "choices": choices}

    def opening(self, choice: int, copies: int) -> dict[str, Any] | None:
        return self._choice(choice, {"role": "assistant", "content": ""}, None, None)

    def token(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        logprobs = None if event.special else self._logprobs([generated(event)])
        return self._choice(choice, {"content": event.text}, logprobs, None)

    def end(self, choice: int, result: GenerateResult) -> dict[str, Any]:
        delta = {"content": result.tail} if result.tail else {}
        return self._choice(choice, delta, None, finish_reason(result))

    def _choice(
        self, index: int, delta: dict[str, str], logprobs: Any, finish: str | None
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
                if event.text:
                    yield chunk(shape.token(index, event))
            elif isinstance(event, GenerateResult):
                yield chunk(shape.end(index, event))
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
