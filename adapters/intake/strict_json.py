"""JSON from strangers, parsed strictly.

``adapter_config.json``, a model's ``config.json`` and the header of a safetensors file all pass
through here. What the values mean is left to the callers.
"""

from __future__ import annotations

import json
from typing import Any

from adapters.errors import CorruptFile

MAX_JSON_BYTES = 1 << 20


def strict_json(raw: bytes, name: str, limit_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, NaN, and anything deep or large.

    Args:
        raw: UTF-8 bytes.
        name: The file's name, for the error.
        limit_bytes: The most bytes to accept.

    Raises:
        CorruptFile: Not such an object; ``found`` says what is wrong with it.
    """
    content = _parse_bounded_json(raw, name, limit_bytes)
    if not isinstance(content, dict):
        raise CorruptFile(
            f"{name} is not a JSON object.", found=type(content).__name__, expected="an object"
        )
    return content


def strict_list(raw: bytes, name: str) -> list[Any]:
    """As ``strict_json``, for a file that holds a list."""
    content = _parse_bounded_json(raw, name, MAX_JSON_BYTES)
    if not isinstance(content, list):
        raise CorruptFile(
            f"{name} is not a JSON list.", found=type(content).__name__, expected="a list"
        )
    return content


def _parse_bounded_json(raw: bytes, name: str, limit_bytes: int) -> Any:
    if len(raw) > limit_bytes:
        raise CorruptFile(
            f"{name} is too large.", found=f"{len(raw)} bytes", expected=f"at most {limit_bytes}"
        )
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        if rb"\ud" in raw.lower():  # half a character could be written nowhere again
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as cause:
        raise CorruptFile(
            f"{name} is not valid JSON.",
            found=str(cause)[:200] or type(cause).__name__,
            expected="JSON in UTF-8, without duplicate keys",
            fix="Save the adapter again with PEFT's save_pretrained.",
        ) from cause
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {_first_repeated(keys)[:80]!r}")
    return content


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is repeated")


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def show(value: object) -> str:
    """A short form of any value, for the ``found`` of an error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
