"""The body of /v1/responses and what it answers, in OpenAI's shape: texts and calls of functions.

No state is kept: a response cannot be fetched or continued later, whatever ``store`` says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.edge.endpoints.openai_body import ModelNamed, extra_fields
from server.edge.endpoints.schemas_conversation import (
    MAX_TOOLS,
    CalledFunction,
    ChatMessage,
    ContentPart,
    FunctionName,
    FunctionSpec,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
    check_tools,
)
from server.errors import Refusal

MAX_ITEMS = 1024
# Fields that would change the answer, with the values by which they do not.
NEUTRAL_HERE: dict[str, tuple[object, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (False, None),
    "prompt": (None,),
    "max_tool_calls": (None,),
    "reasoning": (None, {}),
    "include": ([], None),
    "truncation": ("disabled", None),
    "context_management": (None, []),
}
# What the items of an earlier answer have, when they are sent back.
_OF_OUTPUTS = frozenset(
    {"input.id", "input.status", "input.content.annotations", "input.content.logprobs"}
)
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
        return ChatMessage(role=self.role, content=given)


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
    output: str | Annotated[list[InputPart], Field(fail_fast=True)]

    def message(self) -> ChatMessage:
        output = self.output
        if not isinstance(output, str):
            output = "".join(part.text for part in output)
        return ChatMessage(role="tool", tool_call_id=self.call_id, content=output)


InputItem = InputCall | InputResult | InputMessage


class ResponseTool(BaseModel):
    """A function that may be called; tools that the server itself would have to run are refused."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="True: arguments are held to the schema where any call may come."
    )

    def plain(self) -> dict[str, Any]:
        """As the answer gives it back."""
        shown = {"parameters": self.parameters, "strict": self.strict}
        return {"type": self.type, "name": self.name, "description": self.description, **shown}

    def tool(self) -> Tool:
        """In the words of a chat."""
        assert self.name is not None
        function = FunctionSpec(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )
        return Tool(type="function", function=function)


class ResponseToolChoice(BaseModel):
    """The function that is to be called."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    name: str | None = None


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
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=True, description="False: one call alone.")
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
            for item in given:
                message = item.message()
                last = messages[-1] if messages else None
                if isinstance(item, InputCall) and last is not None and last.role == "assistant":
                    # What was one answer is one message: templates want turns that alternate.
                    calls = [*(last.tool_calls or ()), *(message.tool_calls or ())]
                    messages[-1] = last.model_copy(update={"tool_calls": calls})
                else:
                    messages.append(message)
        return [one.plain() for one in messages]

    @property
    def functions(self) -> list[Tool]:
        """The tools, in the words of a chat."""
        return [one.tool() for one in self.tools or ()]

    @property
    def choice(self) -> ToolChoice | None:
        """Which tool is to be called, in the words of a chat."""
        given = self.tool_choice
        if isinstance(given, ResponseToolChoice):
            return NamedTool(type="function", function=NamedFunction(name=given.name or ""))
        return given

    def used_tools(self) -> list[dict[str, Any]]:
        """The tools that the template is to show: none where none may be called."""
        return [] if self.tool_choice == "none" else [one.plain() for one in self.functions]

    @property
    def format(self) -> TextFormat:
        """What the answer is held to; a text, where nothing is asked for."""
        return (self.text and self.text.format) or TextFormat()

    def ignored_within(self) -> list[str]:
        items = () if isinstance(self.input, str) else self.input
        contents = [
            one.output if isinstance(one, InputResult) else one.content
            for one in items
            if not isinstance(one, InputCall)
        ]
        parts = (part for one in contents if not isinstance(one, str) for part in one)
        found = [
            *extra_fields("text", [self.text] if self.text else ()),
            *extra_fields("tools", self.tools or ()),
            *extra_fields("input", items),
            *extra_fields("input.content", parts),
        ]
        return [one for one in found if one not in _OF_OUTPUTS]

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
        self._check_kinds()
        super().check_supported()
        check_tools(self.functions, self.choice)
        if self.format.type == "json_schema" and self.format.schema_ is None:
            raise Refusal.because(
                "unsupported_grammar",
                "The grammar cannot be honoured.",
                found="type json_schema without schema",
                expected="format with type, name and schema",
                field="text.format",
            )

    def _check_kinds(self) -> None:
        """Refuses tools, and a choice of one, that are no functions."""
        for one in self.tools or ():
            if one.type != "function" or one.name is None:
                raise Refusal.because(
                    "unsupported_parameter",
                    "A tool cannot be honoured by this server: it calls none itself.",
                    found=f"a tool of type {one.type[:60]!r}"
                    + (" without a name" if one.name is None else ""),
                    expected="type function, with a name",
                    fix="Give it as a function, and call it in the client.",
                    field="tools",
                )
        choice = self.tool_choice
        if isinstance(choice, ResponseToolChoice) and choice.type != "function":
            raise Refusal.because(
                "unsupported_parameter",
                "A choice among tools cannot be honoured by this server.",
                found=f"type {choice.type[:60]!r}",
                expected="none, auto, required, or type function with a name",
                field="tool_choice",
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


class OutputCall(BaseModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


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
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
