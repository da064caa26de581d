"""From the messages of a chat to a prompt, and from an adapter's own defaults to a request's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request as HttpRequest

from adapters.errors import AdapterError
from server.edge.admit.slow_work import INPUT_CHARACTERS, pool_refusals
from server.edge.endpoints.answers import deadline_of
from server.edge.service import Service
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.conversation import base_template, template_of
from server.inputs.rendering import ChatTemplate, ChatTemplateUnread
from server.inputs.text_errors import TextError
from server.messages import SamplingOptions

# What a request may leave to the defaults of its adapter.
ADAPTER_DEFAULTS: Final = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


async def template_for(
    service: Service, target: Target, *, with_tools: bool = False
) -> tuple[str, ChatTemplate]:
    """Whose turn it is to render, and the template: the adapter's own or the base's.

    Raises:
        Refusal: chat_template_missing, chat_template_failed; what the store says.
    """
    text, version = service.base.texts, target.version
    try:
        if target.own_template and version is not None:
            found = await service.templates.conversation(version)
            template = template_of(found, text, target.shown, with_tools=with_tools)
            return version, template
        return "", base_template(text, with_tools=with_tools)
    except TextError as error:
        raise Refusal.of(error, "model") from None
    except AdapterError as error:
        raise Refusal.of(error) from None


async def chat_prompt(
    request: HttpRequest,
    service: Service,
    target: Target,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    field: str = "messages",
) -> str:
    """The prompt of a conversation, by the adapter's own chat template or by the base's.

    Args:
        request: The call.
        service: Of this process.
        target: Whom it is for.
        messages, tools: As templates take them.
        variables: What the client gives the template beside them.
        field: Where the body has the messages, for an error.

    Raises:
        Refusal: chat_template_missing, chat_template_failed, invalid_request for a conversation
            that the template refuses, unsupported_parameter for tools or variables that it never
            reads; overloaded or deadline_exceeded; what the store says.
    """
    templates = service.templates
    key, template = await template_for(service, target, with_tools=bool(tools))
    deadline = deadline_of(request, service)
    most = max(1, service.settings.max_queue_requests // service.settings.api_processes)
    try:
        with pool_refusals(
            service.dispatcher.admission, "the conversation was rendered", "a conversation"
        ):
            return await templates.render(
                key,
                template,
                messages,
                characters(messages) + characters(tools),
                deadline=deadline,
                most=most,
                tools=tools,
                variables=variables,
            )
    except ChatTemplateUnread as error:
        place = "tools" if error.name == "tools" else f"chat_template_kwargs.{error.name}"
        raise Refusal.of(error, place) from None
    except TextError as error:
        raise Refusal.of(error, field) from None


def characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """About how long a conversation is, in characters."""
    return sum(
        INPUT_CHARACTERS + sum(len(str(value)) for value in message.values())
        for message in messages
    )


def with_defaults(
    sampling: SamplingOptions, target: Target, said: Collection[str]
) -> SamplingOptions:
    """The options of a request, with the adapter's own end tokens and its own defaults for what
    the request does not say.

    Args:
        sampling: Of the request, with the defaults of its call.
        target: Whom it is for.
        said: Those of ``ADAPTER_DEFAULTS`` that the request says.
    """
    own = target.generation
    changes = {name: own[name] for name in ADAPTER_DEFAULTS if name in own and name not in said}
    if "top_k" in changes:
        changes["top_k"] = max(0, changes["top_k"])
    if "end_ids" in own:
        changes["end_ids"] = tuple(own["end_ids"])
    return replace(sampling, **changes) if changes else sampling
