"""Bodies of the calls under /v1, in OpenAI's shape.

One rule for what is not here: a field that nobody knows is ignored, as OpenAI-compatible servers
do, and named in a header of the answer; a field that would change the answer and cannot be honoured
is refused with 400.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.edge.endpoints.schemas import (
    MAX_ALTERNATIVES,
    MAX_COPIES,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_K,
    Texts,
    nullable,
    without_nulls,
)
from server.errors import Fault, Refusal

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Ids = Annotated[list[int], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]
MAX_IDS = 1 << 16  # of a list of token ids among the options
MAX_BIASED = 1024
MAX_BAD_WORDS = 256
OpenAIFinishReason = Literal["stop", "length", "tool_calls"]
MAX_TOOLS = 128
MAX_VARIABLES = 64
# Names that a template knows already, or that jinja keeps to itself.
KEPT_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"self", "loop", "caller", "varargs", "kwargs", "super"}
)
# Neutral values of what we cannot do; any other value is refused, not ignored.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "logprobs": (False, 0, None),
    "top_logprobs": (0, None),
    "prompt_logprobs": (None,),
    "min_p": (0, None),
    "typical_p": (1, None),
    "min_tokens": (0, None),
    "stop_token_ids": ([], None),
    "bad_words": ([], None),
    "allowed_token_ids": (None,),
    "logits_processors": ([], None),
    "use_beam_search": (False, None),
    "length_penalty": (1, None),
    "include_stop_str_in_output": (False, None),
    "skip_special_tokens": (True, None),
    "truncate_prompt_tokens": (None,),
    "add_special_tokens": (None,),
    "return_token_ids": (False, None),
    "return_tokens_as_token_ids": (False, None),
    "prompt_embeds": (None,),
    # Conversations
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "chat_template": (None,),
    "chat_template_kwargs": ({}, None),
    "documents": ([], None),
    "add_generation_prompt": (True, None),
    "continue_final_message": (False, None),
    "reasoning_effort": (None,),
    "verbosity": ("medium", None),
    "audio": (None,),
    "modalities": (["text"], None),
    "web_search_options": (None,),
    # What an answer must be like
    "structural_tag": (None,),
    "guided_decoding_backend": (None,),
    "guided_whitespace_pattern": (None,),
    "grammar": (None,),
    # Vectors and ranks
    "encoding_format": ("float", "base64", None),
    "dimensions": (None,),
    "rank_fields": ([], ["text"], None),
    "max_chunks_per_doc": (None,),
    "max_tokens_per_doc": (None,),
    "instruction": ("", None),
}
# Fields that are known to have no effect here.
V1_WITHOUT_EFFECT = frozenset({"user"})
MAX_NAMED = 32  # ignored fields that are named
MAX_NAMED_CHARACTERS = 64


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

    def ignored(self) -> tuple[str, ...]:
        """Fields that are there and have no effect, as a header can say them."""
        given = (*(self.model_extra or {}), *sorted(V1_WITHOUT_EFFECT & self.model_fields_set))
        names = [
            name for name in given if name not in NEUTRAL and getattr(self, name, None) is not None
        ]
        names += self.ignored_within()
        shown = dict.fromkeys(
            quote(name[:MAX_NAMED_CHARACTERS], safe=".", errors="replace")
            for name in names[:MAX_NAMED]
        )
        return tuple(shown)

    def ignored_within(self) -> list[str]:
        """Dotted names of ignored fields that are not at the top of the body."""
        return []

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


def _few(content: Any) -> Any:
    """Before each of its entries is looked at: to tell what is wrong with a million takes long."""
    if isinstance(content, dict) and len(content) > MAX_BIASED:
        raise ValueError(f"at most {MAX_BIASED} tokens may be biased")
    return content


Bias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_few),
]


def _wrong(field: str, message: str, found: str, expected: str) -> Refusal:
    return Refusal((Fault("invalid_request", message, found, expected, field=field),))


class ModelNamed(OpenAIBody):
    model: str | None = Field(
        default=None,
        description="An adapter's name, or the base's; without one the server's default answers.",
    )


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
    list[Annotated[str, Field(min_length=1)]], Field(max_length=4096, fail_fast=True)
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
        options = self.stream_options
        extra = {} if options is None else options.model_extra or {}
        return [f"stream_options.{name}" for name, value in extra.items() if value is not None]


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


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="True: arguments are held to the schema where any call may come."
    )


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function"]
    function: FunctionSpec

    def plain(self) -> dict[str, Any]:
        """A tool as chat templates take it."""
        function = self.function
        said = {"name": function.name, "description": function.description or ""}
        return {"type": self.type, "function": {**said, "parameters": function.parameters or {}}}


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class ConversationBody(ModelNamed):
    """What a chat template writes out: the same for a call that answers and one that counts."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="What the chat template reads beside the messages."
    )
    reasoning_effort: str | None = Field(
        default=None, description="The same as a variable of the chat template."
    )

    def ignored_within(self) -> list[str]:
        extra = dict.fromkeys(
            name
            for message in self.messages
            for name, value in (message.model_extra or {}).items()
            if value is not None
        )
        more = dict.fromkeys(
            f"{place}.{name}"
            for tool in self.tools or ()
            for place, one in (("tools", tool), ("tools.function", tool.function))
            for name, value in (one.model_extra or {}).items()
            if value is not None
        )
        return [*super().ignored_within(), *(f"messages.{name}" for name in extra), *more]

    @property
    def variables(self) -> dict[str, Any]:
        """What the client gives the template beside messages and tools."""
        own = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            own["reasoning_effort"] = self.reasoning_effort
        return own

    def used_tools(self) -> list[dict[str, Any]]:
        """The tools that the template is to show: none where none may be called."""
        if self.tool_choice == "none":
            return []
        return [one.plain() for one in self.tools or ()]

    def check_supported(self) -> None:
        super().check_supported()
        names = [one.function.name for one in self.tools or ()]
        choice = self.tool_choice
        if len(names) != len(set(names)):
            twice = next(one for one in names if names.count(one) > 1)
            raise _wrong("tools", "Two tools have one name.", repr(twice), "a name for each")
        if choice not in (None, "none", "auto") and not names:
            raise _wrong("tool_choice", "There is nothing to choose.", "no tools", "tools")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise _wrong(
                "tool_choice",
                "The tool that is named is not among the tools.",
                repr(choice.function.name[:80]),
                ", ".join(names)[:200],
            )
        if any((one.model_extra or {}).get("function_call") for one in self.messages):
            raise Refusal.because(
                "unsupported_parameter",
                "A message has function_call, which no template reads.",
                found="function_call",
                expected="tool_calls",
                field="messages",
            )
        self._check_variables()

    def _check_variables(self) -> None:
        given = self.chat_template_kwargs or {}
        wrong = next(
            (
                name
                for name in given
                if not name.isidentifier()
                or name.startswith("_")
                or name in KEPT_NAMES
                or name.endswith(("_token", "_tokens"))
            ),
            None,
        )
        if wrong is not None or len(given) > MAX_VARIABLES:
            raise _wrong(
                "chat_template_kwargs",
                "A variable of the chat template cannot be given.",
                repr(wrong[:80]) if wrong is not None else f"{len(given)} variables",
                f"at most {MAX_VARIABLES} names that are not the server's own, such as messages, "
                "tools or eos_token",
            )


class ChatRequest(ConversationBody, Sampling):
    parallel_tool_calls: bool | None = Field(default=True, description="False: one call alone.")
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


class AnsweredFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None


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
    alias_of: str | None = Field(description="Of an alias: the adapter that answers.")


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
