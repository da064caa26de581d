"""How conversations become prompts on one base, and what of an adapter's own ways is used for it.

An adapter's template, end tokens and defaults are those of the tokenizer that it was trained with.
They are used where that tokenizer and the base's say the same; each that is not is named in a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from adapters.intake.conversation import (
    GENERATION_FILE,
    MAX_TEMPLATE_BYTES,
    Conversation,
    UsedConversation,
)
from server.inputs.rendering import ChatTemplate, ChatTemplateFailed, RenderProcess
from server.inputs.text import Text
from server.inputs.text_errors import TextError

# A short conversation that every template should take; the words are looked for in its prompt.
TRIED: Final = ({"role": "user", "content": "Good morning"},)
_TOKENS_SHOWN: Final = 8
_NOT_USED: Final = "its chat template is not used, the base's is"


class ChatTemplateMissing(TextError):
    """Neither the base nor the adapter has a chat template."""

    code = "chat_template_missing"


def settle(conversation: Conversation, text: Text, process: RenderProcess) -> UsedConversation:
    """Decide what of an adapter's conversation is used on this base.

    Args:
        conversation: What it brings.
        text: The base's tokenizer.
        process: Where its template is tried, with the limits that a request has.

    Returns:
        What is used, and a note for each thing that is not.
    """
    notes = list(_lacking(conversation, text))
    generation: dict[str, Any] = dict(conversation.sampling)
    ends = _ends(conversation, text, notes)
    if ends:
        generation["end_ids"] = list(ends)
    template = conversation.templates.get("default")
    if template is None:
        if conversation.templates:
            notes.append(f"{_NOT_USED}: it is for tools only")
        return UsedConversation(False, generation, tuple(notes))
    reasons = list(_disagreements(template, conversation, text))
    if not reasons:
        reasons = list(_faults(template_of(conversation, text, "the adapter"), process))
    if reasons:
        notes.append(f"{_NOT_USED}: {'; '.join(reasons)}")
    return UsedConversation(not reasons, generation, tuple(notes))


def template_of(
    conversation: Conversation, text: Text, owner: str, *, with_tools: bool = False
) -> ChatTemplate:
    """An adapter's own template, with its special tokens in the place of the base's.

    Args:
        conversation: What it brings.
        text: The base's tokenizer.
        owner: The adapter's name.
        with_tools: Take the one for tools, where there is one.

    Raises:
        ChatTemplateFailed: The one for tools writes tokens that the base has not.
    """
    template = conversation.templates["default"]
    own = conversation.templates.get("tool_use") if with_tools else None
    if own is not None:
        reasons = "; ".join(_disagreements(own, conversation, text))
        if reasons:
            raise ChatTemplateFailed(
                f"The template for tools of {owner} does not fit the base.",
                found=reasons[:200],
                expected="tokens that the base has under the same ids",
                fix="Ask without tools.",
            )
        template = own
    variables = {**text.special_tokens, **conversation.special_tokens}
    return ChatTemplate(template, variables, owner)


def base_template(text: Text, *, with_tools: bool = False) -> ChatTemplate:
    """The base's template.

    Args:
        text: The base's tokenizer.
        with_tools: Take the one for tools, where there is one.

    Raises:
        ChatTemplateMissing: It has none.
    """
    own = text.tool_template if with_tools else text.chat_template
    if own is None:
        raise ChatTemplateMissing(
            "The base's tokenizer has no chat template.",
            found="no chat_template",
            expected="a tokenizer with a chat template, or an adapter with one of its own",
            fix="Use /v1/completions, or start the server with --chat-template FILE.",
        )
    return ChatTemplate(own, text.special_tokens)


def read_template(path: Path, text: Text, process: RenderProcess) -> str:
    """The template that the operator names for the base.

    Raises:
        ValueError: It cannot be read, is too large, or does not render a short conversation; the
            text says what was found.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEMPLATE_BYTES + 1)
        template = raw.decode("utf-8")
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise ValueError(f"it is larger than {MAX_TEMPLATE_BYTES} bytes")
    reasons = list(_faults(ChatTemplate(template, text.special_tokens, str(path)), process))
    if reasons:
        raise ValueError("; ".join(reasons))
    return template


def _faults(template: ChatTemplate, process: RenderProcess) -> Iterator[str]:
    """Why a template does not render a short conversation."""
    try:
        prompt = process.render(template, TRIED)
    except TextError as error:
        parts = {"found": error.found, "expected": error.expected, "fix": error.fix}
        told = [error.message.rstrip("."), *(f"{name}: {it}" for name, it in parts.items() if it)]
        yield "; ".join(told)
        return
    if TRIED[0]["content"] not in prompt:
        yield (
            f"it leaves out what the user says; found: {prompt[:80]!r}; expected: a prompt with "
            f"{TRIED[0]['content']!r} in it; fix: write out each message's content"
        )


def _lacking(conversation: Conversation, text: Text) -> Iterator[str]:
    """Added tokens that the base has not, or has under another id."""
    lacking = [token for token, id_ in conversation.added.items() if text.id_of(token) != id_]
    if lacking:
        more = f" and {len(lacking) - _TOKENS_SHOWN} more" if len(lacking) > _TOKENS_SHOWN else ""
        shown = ", ".join(repr(token[:80]) for token in lacking[:_TOKENS_SHOWN])
        yield (
            f"added tokens that the base's vocabulary has not, or under other ids: {shown}{more}; "
            "their text is read as the base's tokenizer reads it"
        )


def _disagreements(template: str, conversation: Conversation, text: Text) -> Iterator[str]:
    """Special tokens of a template that would become other ids than the adapter was taught."""
    named = {
        token: f"{name} {token[:80]!r}"
        for name, token in conversation.special_tokens.items()
        if name in template
    }
    written = {token: repr(token[:80]) for token in conversation.token_ids if token in template}
    for token, shown in {**written, **named}.items():
        reason = _disagreement(token, conversation.token_ids, text)
        if reason is not None:
            yield f"{shown} {reason}"


def _disagreement(token: str, ids: Mapping[str, int], text: Text) -> str | None:
    base, own = text.id_of(token), ids.get(token)
    if base is None:
        return "is no token of the base"
    if own is not None and own != base:
        return f"has id {own} for the adapter and {base} for the base"
    return None


def _ends(conversation: Conversation, text: Text, notes: list[str]) -> tuple[int, ...]:
    """The ids that end an answer: those of the generation's file, else the tokenizer's own."""
    if conversation.end_ids is not None:
        spelled = {id_: token for token, id_ in conversation.token_ids.items()}
        good = []
        for id_ in conversation.end_ids:
            base, own = text.token_of(id_), spelled.get(id_)
            if base is None:
                reason = "the base has no such token"
            elif own is not None and own != base:
                reason = f"it is {own[:80]!r} for the adapter and {base[:80]!r} for the base"
            else:
                good.append(id_)
                continue
            notes.append(f"{GENERATION_FILE}: eos_token_id {id_} is not used: {reason}")
        return tuple(good)
    token = conversation.special_tokens.get("eos_token")
    if token is None:
        return ()
    disagreement = _disagreement(token, conversation.token_ids, text)
    end = text.id_of(token)
    if disagreement is not None or end is None:
        notes.append(f"its end token {token[:80]!r} is not used: it {disagreement}")
        return ()
    return (end,)
