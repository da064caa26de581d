"""Bodies of calls: JSON, or JSON and multipart forms with image files on one path.

FastAPI would read and check them on the event loop, and takes one kind of body for a path, so all
are read here: large ones in a thread. Faults in JSON leave in FastAPI's words; the limits on a
body's size and pace are the gate's.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from server.edge.endpoints.json_text import AT_ONCE_BYTES, parse_json
from server.edge.endpoints.middleware import BodyRefused
from server.edge.service import Service
from server.errors import Fault, Refusal

BodyT = TypeVar("BodyT", bound=BaseModel)
T = TypeVar("T")

FORM_FIELD: Final = "inputs"  # the form's field with the images
_FIELDS: Final = ("parameters", "adapter")  # of a form, beside the files
_MAX_FORM_FILES: Final = 1024  # what a request may hold is checked with the settings, afterwards
_PLACEHOLDER: Final = "-"  # stands for a file where the model wants a text


@dataclass(frozen=True)
class ValidatedBody(Generic[BodyT]):
    """A body, and the files that came with it.

    Args:
        body: As the model has it; with files, its ``inputs`` are placeholders.
        files: Whole files, in order; None for JSON.
    """

    body: BodyT
    files: tuple[bytes, ...] | None = None


def posted(model: type[BodyT]) -> Callable[[Request], Awaitable[ValidatedBody[BodyT]]]:
    """A dependency that reads a request's body as ``model``."""

    async def read(request: Request) -> ValidatedBody[BodyT]:
        if request.headers.get("content-type", "").startswith("multipart/"):
            return await _form(request, model)
        return ValidatedBody(await read_json(request, model))

    return read


def sent_json(model: type[BodyT]) -> Callable[[Request], Awaitable[BodyT]]:
    """A dependency that reads a request's JSON body as ``model``."""

    async def read(request: Request) -> BodyT:
        return await read_json(request, model)

    return read


async def read_json(request: Request, model: type[BodyT], *, any_type: bool = False) -> BodyT:
    """The JSON body of a request.

    Args:
        request: Of which the gate knows.
        model: What the body has to be.
        any_type: Take it for JSON whatever its content type says.

    Raises:
        Refusal: request_too_large for too many values; as `SlowWork.run`.
        RequestValidationError: It is no JSON, or not as the model has it.
        HTTPException: 400 where it cannot be decoded.
    """
    raw = await request.body()
    if not raw:
        raise RequestValidationError(
            [{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}]
        )
    if not (any_type or _is_json(request)):
        return checked(model, raw)
    return await _aside(request, len(raw), lambda: checked(model, _parse_body(raw)))


def form_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of such a body."""
    content = _content(model)
    named: dict[str, Any] = {
        one: {"type": "string", "description": "A JSON object" if one == "parameters" else ""}
        for one in _FIELDS
    }
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": [FORM_FIELD],
        "properties": {FORM_FIELD: files | {"description": "Images"}, **named},
    }
    return {
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {**content, "multipart/form-data": {"schema": form}},
            }
        }
    }


def described_json(model: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a body that is always JSON."""
    return {"openapi_extra": {"requestBody": {"required": True, "content": _content(model)}}}


async def _aside(request: Request, size: int, work: Callable[[], T]) -> T:
    """Run the work on a body: a large one's in a thread."""
    if size <= AT_ONCE_BYTES:
        return work()
    service: Service = request.scope["hira_service"]
    return await service.slow_work.run(work, "bodies", size_bytes=size)


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and "+json" in kind)


def _parse_body(raw: bytes) -> Any:
    try:
        return parse_json(raw)
    except json.JSONDecodeError as error:
        fault = {
            "type": "json_invalid",
            "loc": ("body", error.pos),
            "msg": "JSON decode error",
            "input": {},
            "ctx": {"error": error.msg},
        }
        raise RequestValidationError([fault]) from None
    except (ValueError, RecursionError):  # not UTF-8, or nested without end
        raise HTTPException(400) from None


def _content(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}


def checked(model: type[BodyT], content: Any) -> BodyT:
    """A body's values as ``model`` has them.

    Raises:
        RequestValidationError: They are not so.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise RequestValidationError(
            [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
        ) from None


async def _form(request: Request, model: type[BodyT]) -> ValidatedBody[BodyT]:
    files: list[bytes] = []
    content: dict[str, Any] = {}
    try:
        async with request.form(max_files=_MAX_FORM_FILES, max_fields=len(_FIELDS)) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != FORM_FIELD:
                        raise _wrong_field(name, "a file", f"files in the field {FORM_FIELD}")
                    files.append(await value.read())
                elif name not in _FIELDS or name in content:
                    raise _wrong_field(name, "a field", "one each of " + ", ".join(_FIELDS))
                else:
                    content[name] = value
    except BodyRefused:
        raise
    except HTTPException as error:
        raise Refusal.because(
            "malformed_body",
            "The multipart body cannot be read.",
            found=str(error.detail)[:120],
            expected=f"multipart/form-data with files in the field {FORM_FIELD}",
        ) from None
    if not files:
        raise _wrong_field(FORM_FIELD, "no file", "one or more images")
    text = content.get("parameters", "")

    def from_form() -> BodyT:
        if "parameters" in content:
            content["parameters"] = _object(text)
        return checked(model, {**content, FORM_FIELD: [_PLACEHOLDER] * len(files)})

    return ValidatedBody(await _aside(request, len(text), from_form), tuple(files))


def _object(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        raise _wrong_field("parameters", "no JSON", "a JSON object") from None


def _wrong_field(field: str, found: str, expected: str) -> Refusal:
    message = "The form holds something else than it may."
    return Refusal((Fault("invalid_request", message, found, expected, field=field[:80]),))


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its definitions in place: the document has no room for them beside it."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {name: _inlined(one, definitions) for name, one in schema.items() if name != "$ref"}
    reference = schema.get("$ref")
    if reference is None:
        return rest
    return {**_inlined(definitions[reference.rsplit("/", 1)[-1]], definitions), **rest}
