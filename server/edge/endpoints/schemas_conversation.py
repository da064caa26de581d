"""Conversations in OpenAI's shape: messages, tools, and what a chat template reads beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.edge.endpoints.openai_body import ModelNamed, extra_fields
from server.edge.endpoints.schemas import MAX_ALTERNATIVES
from server.edge.endpoints.schemas_openai import Sampling
from server.errors import Fault, Refusal

MAX_TOOLS = 128
MAX_VARIABLES = 64
# Names that a template knows already, or that jinja keeps to itself.
KEPT_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"self", "loop", "caller", "varargs", "kwargs", "super"}
)


def _wrong(field: str, message: str, found: str, expected: str) -> Refusal:
    return Refusal((Fault("invalid_request", message, found, expected, field=field),))


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
        # Templates know the older word; one that knows no other would leave the message out.
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if content or not self.tool_calls:
            said["content"] = content or ""
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value is not None:
                said[name] = value
        if self.tool_calls:
            said["tool_calls"] = [one.plain() for one in self.tool_calls]
        return said


FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    name: FunctionName
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


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Refuses two tools of one name, and a choice that there is not.

    Raises:
        Refusal: invalid_request.
    """
    names = [one.function.name for one in tools]
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


class ConversationBody(ModelNamed):
    """What a chat template writes out: the same for a call that answers and one that counts."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="What the chat template reads beside the messages."
    )
    reasoning_effort: str | None = Field(
        default=None, description="The same as a variable of the chat template."
    )

    def ignored_within(self) -> list[str]:
        contents = (one.content for one in self.messages if isinstance(one.content, list))
        calls = [call for one in self.messages for call in one.tool_calls or ()]
        tools = self.tools or ()
        return [
            *super().ignored_within(),
            *extra_fields("messages", self.messages),
            *extra_fields("messages.content", (part for content in contents for part in content)),
            *extra_fields("messages.tool_calls", calls),
            *extra_fields("messages.tool_calls.function", (one.function for one in calls)),
            *extra_fields("tools", tools),
            *extra_fields("tools.function", (one.function for one in tools)),
        ]

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
        check_tools(self.tools or (), self.tool_choice)
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
