"""The body of /v1/responses and what it answers, in OpenAI's shape: text in, text out.

No state is kept: a response cannot be fetched or continued later, whatever ``store`` says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.edge.endpoints.openai_body import ModelNamed
from server.edge.endpoints.schemas_conversation import (
    CalledFunction,
    ChatMessage,
    ContentPart,
    ToolCall,
)
from server.errors import Refusal

MAX_ITEMS = 1024
# Fields that would change the answer, with the values by which they do not.
NEUTRAL_HERE: dict[str, tuple[object, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (False, None),
    "prompt": (None,),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "max_tool_calls": (None,),
    "reasoning": (None, {}),
    "include": ([], None),
    "truncation": ("disabled", None),
    "context_management": (None, []),
}
_FIXES = {
    "previous_response_id": "No response is kept here: send the whole conversation as input.",
    "conversation": "No conversation is kept here: send the whole of it as input.",
}


class InputPart(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputPart], Field(fail_fast=True)]

    def message(self) -> ChatMessage:
        parts = self.content
        given = (
            parts
            if isinstance(parts, str)
            else [ContentPart(type="text", text=part.text) for part in parts]
        )
        # Templates know the older word.
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=given)


class InputCall(BaseModel):
    """A call of a tool, of an earlier answer."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def message(self) -> ChatMessage:
        function = CalledFunction(name=self.name, arguments=self.arguments)
        return ChatMessage(
            role="assistant", tool_calls=[ToolCall(id=self.call_id, function=function)]
        )


class InputResult(BaseModel):
    """What a tool has answered."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function_call_output"]
    call_id: str
    output: str

    def message(self) -> ChatMessage:
        return ChatMessage(role="tool", tool_call_id=self.call_id, content=self.output)


InputItem = InputCall | InputResult | InputMessage


class TextFormat(BaseModel):
    """What an answer is held to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="The schema is kept in either case.")


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(ModelNamed):
    input: (
        str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    )
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    stream: bool | None = False
    text: TextOptions | None = None
    store: bool | None = Field(default=False, description="Nothing is kept in either case.")
    metadata: dict[str, str] | None = Field(default=None, description="Given back in the answer.")

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        given = self.input
        messages = (
            []
            if self.instructions is None
            else [ChatMessage(role="system", content=self.instructions)]
        )
        if isinstance(given, str):
            messages.append(ChatMessage(role="user", content=given))
        else:
            messages += [item.message() for item in given]
        return [one.plain() for one in messages]

    @property
    def format(self) -> TextFormat:
        """What the answer is held to; a text, where nothing is asked for."""
        return (self.text and self.text.format) or TextFormat()

    def ignored_within(self) -> list[str]:
        extra = {} if self.text is None else self.text.model_extra or {}
        return [f"text.{name}" for name, value in extra.items() if value is not None]

    def ignored(self) -> tuple[str, ...]:
        named = [name for name in super().ignored() if name not in NEUTRAL_HERE]
        return (*named, *(["store"] if self.store else []))

    def check_supported(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL_HERE and value not in NEUTRAL_HERE[name]:
                raise Refusal.because(
                    "unsupported_parameter",
                    f"{name} cannot be honoured by this server.",
                    found=repr(value)[:80],
                    expected="its neutral value, or no such field",
                    fix=_FIXES.get(name),
                    field=name,
                )
        super().check_supported()
        if self.format.type == "json_schema" and self.format.schema_ is None:
            raise Refusal.because(
                "unsupported_grammar",
                "The grammar cannot be honoured.",
                found="type json_schema without schema",
                expected="format with type, name and schema",
                field="text.format",
            )


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
