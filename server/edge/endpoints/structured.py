"""What an answer is to be held to, as clients of OpenAI, TGI and vLLM write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from server.edge.admit.slow_work import pool_refusals
from server.edge.endpoints.answers import deadline_of
from server.edge.endpoints.schemas import TgiGrammar
from server.edge.endpoints.schemas_openai import Sampling
from server.edge.service import Service
from server.errors import Refusal
from server.inputs.text_errors import TextError
from server.messages import Grammar

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar as a body has it: its kind, what it is, and the field that holds it."""

    kind: str
    content: Any
    field: str


async def settled_grammar(
    request: HttpRequest, service: Service, asked: AskedGrammar | None
) -> Grammar | None:
    """The grammar as the worker takes it, checked; None where none is asked for.

    Raises:
        Refusal: unsupported_grammar, grammar_too_complex, grammar_unreachable; overloaded,
            deadline_exceeded or restarting.
    """
    if asked is None:
        return None
    settings = service.settings
    try:
        with pool_refusals(service.dispatcher.admission, "the grammar was checked", "a grammar"):
            return await service.grammars.check(
                asked.kind,
                asked.content,
                deadline=deadline_of(request, service),
                most=max(1, settings.max_queue_requests // settings.api_processes),
            )
    except TextError as error:
        raise Refusal.of(error, asked.field) from None


def asked_of_tgi(grammar: TgiGrammar | None, field: str) -> AskedGrammar | None:
    """TGI's ``grammar``.

    Raises:
        Refusal: unsupported_grammar for a value that is not of its type.
    """
    if grammar is None:
        return None
    value: Any = grammar.value
    kind = "regex" if grammar.type == "regex" else "json_schema"
    if grammar.type == "json_schema" and isinstance(value, dict):
        value = value.get("schema")
    fits = isinstance(value, str) if kind == "regex" else isinstance(value, dict | str | bool)
    if not fits:
        raise _no_grammar(
            f"{grammar.type} with {type(value).__name__}",
            "a pattern with regex, a schema with json, {name, schema} with json_schema",
            f"{field}.value",
        )
    return AskedGrammar(kind, value, f"{field}.value")


def asked_of_openai(body: Sampling) -> AskedGrammar | None:
    """OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_...``; or None.

    Raises:
        Refusal: invalid_request for more than one; unsupported_grammar for a format that is none.
    """
    found = [*_of_format(body), *_of_outputs(body), *_of_guided(body)]
    if len(found) > 1:
        raise Refusal.because(
            "invalid_request",
            "An answer can be held to one grammar.",
            found=" and ".join(sorted(one.field for one in found)),
            expected="one of them",
            field=found[1].field,
        )
    return found[0] if found else None


def _of_format(body: Sampling) -> list[AskedGrammar]:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object" and wanted.value is None:
        return [AskedGrammar("json_schema", ANY_OBJECT, "response_format")]
    if wanted.type == "json_schema" and wanted.json_schema is not None:
        return [
            AskedGrammar("json_schema", wanted.json_schema.schema_, "response_format.json_schema")
        ]
    if wanted.type == "structural_tag" or wanted.value is None:
        raise _no_grammar(
            f"type {wanted.type}",
            "text, json_object, json_schema with json_schema.schema, or TGI's json, regex and "
            "json_schema with value",
            "response_format",
        )
    tgi = TgiGrammar(
        type="json" if wanted.type == "json_object" else wanted.type, value=wanted.value
    )
    asked = asked_of_tgi(tgi, "response_format")
    return [] if asked is None else [asked]


def _of_outputs(body: Sampling) -> list[AskedGrammar]:
    given = body.structured_outputs
    if given is None:
        return []
    where = "structured_outputs"
    found = []
    if given.json_ is not None:
        found.append(AskedGrammar("json_schema", given.json_, f"{where}.json"))
    if given.regex is not None:
        found.append(AskedGrammar("regex", given.regex, f"{where}.regex"))
    if given.choice:
        found.append(AskedGrammar("choice", given.choice, f"{where}.choice"))
    if given.grammar is not None:
        found.append(AskedGrammar("lark", given.grammar, f"{where}.grammar"))
    if given.json_object:
        found.append(AskedGrammar("json_schema", ANY_OBJECT, f"{where}.json_object"))
    return found


def _of_guided(body: Sampling) -> list[AskedGrammar]:
    found = []
    if body.guided_json is not None:
        found.append(AskedGrammar("json_schema", body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        found.append(AskedGrammar("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice:
        found.append(AskedGrammar("choice", body.guided_choice, "guided_choice"))
    if body.guided_grammar is not None:
        found.append(AskedGrammar("lark", body.guided_grammar, "guided_grammar"))
    return found


def _no_grammar(found: str, expected: str, field: str) -> Refusal:
    return Refusal.because(
        "unsupported_grammar",
        "The grammar cannot be honoured.",
        found=found,
        expected=expected,
        field=field,
    )
