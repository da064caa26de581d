"""Chat templates rendered in a process with bounds: the side of the server.

A template comes with a model or an adapter and is a program of a stranger. Nothing of it runs in a
process of the server: ``server.inputs.template_program`` runs it, with limits on memory, processor
time and the length of what comes out. A process that breaks one of them is ended and the next
conversation gets a new one. Which template is used is said in ``server.inputs.conversation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from server.inputs.bounded_child import BoundedProcess
from server.inputs.text_errors import InputTooSlow, InvalidInput, TextError

PROGRAM: Final = Path(__file__).with_name("template_program.py")
_ESCAPED_BYTES: Final = 12  # the most that one character takes in JSON
_WORD_BYTES: Final = 1 << 16  # of an answer, beside the text


class ChatTemplateFailed(TextError):
    """A chat template that took more than it may have, or is no template."""

    code = "chat_template_failed"


class ChatTemplateUnread(TextError):
    """Something was given to a template that never reads it.

    Args:
        name: Of the variable.
        owner: Whose template it is.
    """

    code = "unsupported_parameter"

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        super().__init__(
            f"The chat template of {owner} does not know {name}.",
            found=name[:80],
            expected="what the template reads",
            fix="Leave it out, or use a template that has it, by --chat-template or of an adapter.",
        )


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one conversation may take.

    Args:
        cpu_s: Seconds of processor time; a usual template takes a thousandth of one.
        memory_bytes: Address space of the process, its own 25 MiB included.
        characters: Of the text that comes out.
    """

    cpu_s: float = 1.0
    memory_bytes: int = 256 << 20
    characters: int = 8 << 20


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template with the words that it knows beside the messages.

    Args:
        text: Jinja.
        variables: The special tokens by name.
        owner: Whose it is, for errors: a name, or "the base".
    """

    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    owner: str = "the base"


class RenderProcess:
    """One process that renders, started when it is first needed. Safe to share between threads,
    which take turns."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self.limits = limits or RenderLimits()
        self._process = BoundedProcess(
            PROGRAM,
            memory_bytes=self.limits.memory_bytes,
            cpu_s=self.limits.cpu_s,
            answer_bytes=_ESCAPED_BYTES * self.limits.characters + _WORD_BYTES,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        deadline: float | None = None,
    ) -> str:
        """The prompt of a conversation, ready for the assistant's turn.

        Args:
            template: Whose text is the same from call to call: it is compiled once.
            messages: As templates take them.
            tools: The same.
            variables: That the client gives beside those of the template, and not in their place.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            ChatTemplateUnread: Of tools or variables.
            InvalidInput: The template refuses the conversation.
            ChatTemplateFailed: It took too much, or is no template.
            InputTooSlow: The deadline passed.
        """
        limits = self.limits
        request = {
            "template": template.text,
            "messages": messages,
            "tools": list(tools) or None,
            "variables": {**(variables or {}), **template.variables},
            "asked": ["tools"] * bool(tools) + list(variables or ()),
            "cpu_s": limits.cpu_s,
            "characters": limits.characters,
        }
        try:
            answer: dict[str, str] = self._process.ask(request, deadline)
        except RecursionError:
            raise InvalidInput(
                "A message is nested too deeply.",
                expected="messages as clients write them",
            ) from None
        except TimeoutError:
            raise InputTooSlow(
                "The deadline passed while the conversation was rendered.",
                fix="Shorten the conversation, or allow more time.",
            ) from None
        if "text" in answer:
            return answer["text"]
        if "unread" in answer:
            raise ChatTemplateUnread(answer["unread"], template.owner)
        if "refused" in answer:
            raise InvalidInput(
                "The chat template refused the messages.",
                found=answer["refused"][:200],
                expected=f"roles and contents that the template of {template.owner} takes",
                fix="Check the order of the roles.",
            )
        raise ChatTemplateFailed(
            f"The chat template of {template.owner} could not be run.",
            found=(answer.get("broken") or answer["exceeded"])[:200],
            expected=f"a template that renders within {limits.cpu_s:g} s of processor time, "
            f"{limits.memory_bytes} bytes of memory and {limits.characters} characters",
            fix="Shorten the conversation, or have whoever made the template mend it.",
        )

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process.close()
