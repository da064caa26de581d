"""Bodies of the calls under /v1 that continue or embed a text, in OpenAI's shape.

Conversations are in `schemas_conversation`, what all bodies have in common in `openai_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.edge.endpoints.openai_body import ModelNamed, OpenAIBody, extra_fields
from server.edge.endpoints.schemas import (
    MAX_ALTERNATIVES,
    MAX_COPIES,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_K,
    Texts,
)

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Ids = Annotated[list[int], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]
MAX_IDS = 1 << 16  # of a list of token ids among the options
MAX_BIASED = 1024
MAX_BAD_WORDS = 256


def _few(content: Any) -> Any:
    """Before each of its entries is looked at: to tell what is wrong with a million takes long."""
    if isinstance(content, dict) and len(content) > MAX_BIASED:
        raise ValueError(f"at most {MAX_BIASED} tokens may be biased")
    return content


Bias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_few),
]


class StreamOptions(OpenAIBody):
    include_usage: bool = False


class NamedSchema(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(default={}, alias="schema")
    strict: bool | None = Field(default=None, description="The schema is kept in either case.")


class ResponseFormat(BaseModel):
    """What an answer is held to, as OpenAI has it; or as text-generation-inference, with value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema", "json", "regex", "structural_tag"]
    json_schema: NamedSchema | None = None
    value: str | dict[str, Any] | bool | None = None


Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=4096, fail_fast=True),
]


class StructuredOutputs(BaseModel):
    """What an answer is held to, as vLLM has it: one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(default=None, description="In Lark, or in GBNF.")
    json_object: bool | None = None


class Sampling(ModelNamed):
    """What both calls that generate take: OpenAI's options, and those of other servers of its
    shape."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Tokens less likely than this times the likeliest do not come."
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="Taken off the logit of every token that was generated."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        default=None, description="The same, times how often it was generated."
    )
    logit_bias: Bias | None = Field(
        default=None, description="Added to the logits of token ids, each from -100 to 100."
    )
    bad_words: Annotated[list[Stop], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = (
        Field(default=None, description="Words, of one token or several, that do not come.")
    )
    allowed_token_ids: (
        Annotated[list[int], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)] | None
    ) = Field(default=None, description="No other token comes.")
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = Field(
        default=None, description="Before so many no end token and no stop string ends the answer."
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_IDS, fail_fast=True)] | None = Field(
        default=None, description="Tokens that end the answer, as end tokens do."
    )
    n: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    user: str | None = None

    def ignored_within(self) -> list[str]:
        named = self.response_format and self.response_format.json_schema
        return [
            *extra_fields("stream_options", [self.stream_options] if self.stream_options else ()),
            *extra_fields("response_format.json_schema", [named] if named else ()),
        ]


class CompletionRequest(Sampling):
    prompt: str | Texts | Ids | IdLists
    best_of: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = Field(
        default=None,
        description="Generate so many and give the n with the greatest mean log-probability.",
    )
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


class EmbeddingRequest(ModelNamed):
    input: str | Texts | Ids | IdLists
    encoding_format: Literal["float", "base64"] | None = "float"
    truncation: bool | None = Field(default=False, description="Cut inputs that are too long.")
    user: str | None = None
