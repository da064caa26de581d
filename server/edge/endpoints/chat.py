"""From the messages of a chat to a prompt, and from an adapter's own defaults to a request's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request as HttpRequest

from adapters.errors import AdapterError
from server.edge.admit.bounded_pool import PoolFull, PoolLate
from server.edge.admit.slow_work import INPUT_CHARACTERS
from server.edge.endpoints.answers import deadline_of
from server.edge.service import Service
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.conversation import ChatTemplateMissing, base_template, template_of
from server.inputs.text import TextError
from server.messages import SamplingOptions

# What a request may leave to the defaults of its adapter.
ADAPTER_DEFAULTS: Final = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


async def chat_prompt(
    request: HttpRequest, service: Service, target: Target, messages: Sequence[Mapping[str, Any]]
) -> str:
    """The prompt of a conversation, by the adapter's own chat template or by the base's.

    Raises:
        Refusal: chat_template_missing, chat_template_failed, invalid_request for a conversation
            that the template refuses; overloaded or deadline_exceeded; what the store says.
    """
    templates = service.templates
    text, version = service.base.texts, target.version
    deadline = deadline_of(request, service)
    most = max(1, service.settings.max_queue_requests // service.settings.api_processes)
    try:
        if target.own_template and version is not None:
            found = await templates.conversation(version)
            template, key = template_of(found, text, target.shown), version
        else:
            template, key = base_template(text), ""
        return await templates.render(
            key, template, messages, characters(messages), deadline=deadline, most=most
        )
    except TextError as error:
        field = "model" if isinstance(error, ChatTemplateMissing) else "messages"
        raise Refusal.of(error, field) from None
    except AdapterError as error:
        raise Refusal.of(error) from None
    except PoolFull as full:
        raise service.dispatcher.admission.overloaded(full.found, full.expected) from None
    except PoolLate:
        raise Refusal.because(
            "deadline_exceeded",
            "The deadline passed before the conversation was rendered.",
            fix="Ask for less, allow more time, or send fewer requests at once.",
        ) from None


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
