"""The program that renders chat templates, in a process of its own with bounds on what it takes.

A template is a program of whoever made the model. It runs in jinja's sandbox, set up as
transformers sets it up, and the process it runs in has little: memory to a limit, processor time to
a limit for each conversation, no files to write, nothing of the server's memory or environment.
``server.inputs.rendering`` starts it and speaks with it over a pipe; of this
project it imports nothing that takes time, so that it starts in a fraction of a second.

    request            {"template", "messages", "tools", "variables", "asked", "cpu_s",
                       "characters"}
    answer             {"text"} or {"refused"} or {"broken"} or {"exceeded"}: why there is none;
                       {"unread"}: the first of the names ``asked`` that the template never reads
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.inputs.bounded_program import answer_requests

COMPILED: Final = 32  # templates kept ready
REASON_CHARACTERS: Final = 300
# One text under all the names that templates read it by.
REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class Generation(Extension):
    """``{% generation %}``, which marks what the assistant said for training; plain text here."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Dictionary:
    """``dict`` for templates: what it makes, without the type that makes it."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class Namespace(jinja2.utils.Namespace):
    """``namespace`` for templates: names that begin with an underscore are not to be had."""

    def __init__(*given: Any, **named: Any) -> None:  # "self" may be a name in it
        own, *pairs = given
        content = dict(*pairs, **named)
        for name in content:
            _check_plain(name)
        jinja2.utils.Namespace.__init__(own, content)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_plain(name)
        super().__setitem__(name, value)


def _check_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a name that begins with an underscore: {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # as templates call it
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().astimezone().strftime(form),
        dict=Dictionary(),
        namespace=Namespace,
    )
    return environment


@lru_cache(COMPILED)
def compiled(template: str) -> jinja2.Template:
    """A template in an environment of its own: nothing passes from one model's to another's."""
    return _environment().from_string(template)


@lru_cache(COMPILED)
def names_of(template: str) -> frozenset[str]:
    """The names that a template reads from outside."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def render(request: Mapping[str, Any]) -> dict[str, str]:
    """The answer to one request: a text, or why there is none."""
    try:
        template = compiled(request["template"])
        known = names_of(request["template"]) if request["asked"] else frozenset()
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        return {"broken": _reason(error)}
    unread = [name for name in request["asked"] if name not in known]
    if unread:
        return {"unread": unread[0]}
    most, pieces, count = int(request["characters"]), [], 0
    try:
        for piece in template.generate(
            messages=[_with_reasoning(one) for one in request["messages"]],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=True,
            **request["variables"],
        ):
            count += len(piece)
            if count > most:
                return {"exceeded": f"more than {most} characters"}
            pieces.append(piece)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a template's program raises
        return {"refused": _reason(error)}
    return {"text": "".join(pieces)}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    said = next((message[one] for one in REASONING if message.get(one) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:REASON_CHARACTERS]


if __name__ == "__main__":
    answer_requests(render, int(sys.argv[1]))
