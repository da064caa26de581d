"""What a registration asks for: the fields of a form, and how the OpenAPI document describes them
beside those of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from server.edge.endpoints.schemas_admin import RegisterRequest
from server.edge.endpoints.uploads import Upload
from server.errors import Fault, Refusal

TRUE: Final = frozenset({"true", "1", "yes", "on"})
FALSE: Final = frozenset({"false", "0", "no", "off", ""})
REGISTRATION_FLAGS: Final = ("replace", "pinned", "preload", "stage")
REGISTER_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": RegisterRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "properties": {
                        "name": {"type": "string"},
                        "replace": {"type": "boolean"},
                        "pinned": {"type": "boolean"},
                        "preload": {"type": "boolean"},
                        "stage": {"type": "boolean"},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "The adapter's files, or one .zip or .tar archive; "
                            "1_Pooling/config.json under a file name with its folder",
                        },
                    },
                }
            },
        },
    }
}


@dataclass(frozen=True, slots=True)
class Registration:
    """What a registration asks for, from JSON or from a form."""

    name: str
    replace: bool
    pinned: bool
    preload: bool
    stage: bool


def registration_of(upload: Upload) -> Registration:
    """The fields of a form.

    Raises:
        Refusal: invalid_request that names the field.
    """
    fields = dict(upload.fields)
    name = fields.pop("name", None)
    flags = {one: _parse_flag(one, fields.pop(one, "")) for one in REGISTRATION_FLAGS}
    faults = [
        Fault("invalid_request", "There is no such field.", field=unknown) for unknown in fields
    ]
    if name is None:
        faults.append(Fault("invalid_request", "Field required", field="name"))
    if not upload.files:
        faults.append(
            Fault(
                "invalid_request",
                "The upload holds no file.",
                expected="adapter_config.json and adapter_model.safetensors, or one archive",
                field="files",
            )
        )
    if faults:
        raise Refusal(faults)
    assert name is not None
    return Registration(name, **flags)


def _parse_flag(name: str, text: str) -> bool:
    if text.lower() not in TRUE | FALSE:
        raise Refusal.because(
            "invalid_request", "Not a yes or no.", found=text[:40], expected="true or false",
            field=name,
        )  # fmt: skip
    return text.lower() in TRUE
