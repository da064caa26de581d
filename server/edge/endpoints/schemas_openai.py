"""Bodies of the calls under /v1, in OpenAI's shape.

One rule for what is not here: a field that nobody knows is ignored, as OpenAI-compatible servers
do; a field that would change the answer and cannot be honoured is refused with 400.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.edge.endpoints.schemas import (
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_K,
    Texts,
    nullable,
    without_nulls,
)
from server.errors import Refusal

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Ids = Annotated[list[int], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]
MAX_ALTERNATIVES = 20
OpenAIFinishReason = Literal["stop", "length"]
# Neutral values of what we cannot do; any other value is refused, not ignored.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "top_logprobs": (0, None),  # of a chat it is a field
    "audio": (None,),
    "modalities": (["text"], None),
    "encoding_format": ("float", "base64", None),
    "dimensions": (None,),
    "min_p": (0, None),
    "guided_json": (None,),
    "guided_regex": (None,),
    "rank_fields": ([], ["text"], None),
    "max_chunks_per_doc": (None,),
    "max_tokens_per_doc": (None,),
    "truncate_prompt_tokens": (None,),
    "instruction": ("", None),
}


class OpenAIBody(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=nullable)

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, content: Any) -> Any:
        return without_nulls(cls, content)

    def unsupported(self) -> list[tuple[str, object]]:
        """Fields that would change the answer and have more than their neutral value."""
        given = {name: getattr(self, name, None) for name in self.model_fields_set}
        return [
            (name, value)
            for name, value in given.items()
            if name in NEUTRAL
            and name not in type(self).model_fields
            and value not in NEUTRAL[name]
        ]

    def check_supported(self) -> None:
        """Raises Refusal for a field that would change the answer and cannot be honoured."""
        for name, value in self.unsupported():
            raise Refusal.because(
                "unsupported_parameter",
                f"{name} cannot be honoured by this server.",
                found=repr(value)[:80],
                expected="its neutral value, or no such field",
                field=name,
            )


class ModelNamed(OpenAIBody):
    model: str | None = Field(
        default=None,
        description="An adapter's name, or the base's; without one the server's default answers.",
    )


class StreamOptions(OpenAIBody):
    include_usage: bool = False


class Sampling(ModelNamed):
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None


class CompletionRequest(Sampling):
    prompt: str | Texts | Ids | IdLists
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = Field(
        default=16, description="0 only with echo: the prompt is scored and nothing generated."
    )
    echo: bool | None = Field(
        default=False, description="The prompt first; with logprobs, those of its tokens too."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        default=None,
        description="The log-probability of each token, and so many of the likeliest in its place.",
    )


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    arguments: str | dict[str, Any] = ""

    def plain(self) -> dict[str, Any]:
        """With the arguments as values, as templates write them; text that is no object stays."""
        arguments = self.arguments
        if isinstance(arguments, str):
            try:
                values = json.loads(arguments)
            except (ValueError, RecursionError):
                values = None
            arguments = values if isinstance(values, dict) else arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        own = {} if self.id is None else {"id": self.id}
        return {**own, "type": self.type, "function": self.function.plain()}


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """A message as chat templates take it: without the fields that say nothing."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        said: dict[str, Any] = {"role": self.role}
        if content or not self.tool_calls:
            said["content"] = content or ""
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value is not None:
                said[name] = value
        if self.tool_calls:
            said["tool_calls"] = [one.plain() for one in self.tool_calls]
        return said


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        default=None, description="With logprobs: so many of the likeliest in each token's place."
    )

    @model_validator(mode="after")
    def _told(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class EmbeddingRequest(ModelNamed):
    input: str | Texts | Ids | IdLists
    encoding_format: Literal["float", "base64"] | None = "float"
    truncation: bool | None = Field(default=False, description="Cut inputs that are too long.")
    user: str | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: OpenAIFinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="Of the base's checkpoint.")
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: OpenAIFinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="Of the base's checkpoint.")
    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None
    root: str
    task: str = Field(description="What it answers, as the tasks of adapters are called.")
    labels: list[str] | None = Field(description="Of a classifier, in the order of its outputs.")
    context: int | None = Field(description="Tokens of one input, or of a prompt and its answer.")
    chat: bool = Field(description="Whether /v1/chat/completions can be asked of it.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: OpenAIErrorBody
