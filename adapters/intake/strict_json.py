"""JSON from strangers: strict parsing, and typed access that collects what is wrong.

``adapter_config.json``, a model's ``config.json`` and the header of a safetensors file all pass
through here. What the values mean is left to the callers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterError, CorruptFile

MAX_JSON_BYTES = 1 << 20
MAX_ENTRIES = 10_000
MAX_RANK = 4_096


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


class Reader:
    """Typed access to a configuration; every wrong type becomes a fault and a default."""

    def __init__(self, content: Mapping[str, Any], faults: list[AdapterError]) -> None:
        self._content = content
        self._faults = faults

    def _wrong(self, option: str, expected: str) -> None:
        self._faults.append(
            CorruptFile(
                f"adapter_config.json: {option} has a value of the wrong kind.",
                found=show(self._content.get(option)),
                expected=expected,
            )
        )

    def text(self, option: str) -> str | None:
        """A string, or None where absent, null or empty."""
        value = self._content.get(option)
        if value is not None and not (isinstance(value, str) and len(value) <= 4_096):
            self._wrong(option, "a short string or null")
            return None
        return value or None

    def flag(self, option: str) -> bool:
        """A boolean; False where absent."""
        value = self._content.get(option, False)
        if value is not None and not isinstance(value, bool):
            self._wrong(option, "true or false")
            return False
        return bool(value)

    def integer(self, option: str, default: int, least: int, most: int) -> int:
        """An integer within bounds."""
        value = self._content.get(option, default)
        if type(value) is not int or not least <= value <= most:
            self._wrong(option, f"an integer from {least} to {most}")
            return default
        return value

    def number(self, option: str, default: float) -> float:
        """A finite number."""
        value = self._content.get(option, default)
        if not _is_number(value):
            self._wrong(option, "a finite number")
            return default
        return float(value)

    def integers(self, option: str) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple."""
        value = self._content.get(option)
        listed = [value] if type(value) is int else value
        if listed is None:
            return ()
        if not (
            isinstance(listed, list)
            and len(listed) <= MAX_ENTRIES
            and all(type(item) is int for item in listed)
        ):
            self._wrong(option, "an integer, a list of integers, or null")
            return ()
        return tuple(listed)

    def names(self, option: str) -> str | tuple[str, ...] | None:
        """A string as it is, or a list of strings sorted (PEFT writes sets in any order)."""
        value = self._content.get(option)
        if value is None or isinstance(value, str):
            return value or None
        if not (
            isinstance(value, list)
            and len(value) <= MAX_ENTRIES
            and all(isinstance(item, str) and 0 < len(item) <= 512 for item in value)
        ):
            self._wrong(option, "a string, a list of strings, or null")
            return ()
        return tuple(sorted(value))

    def ranks(self, option: str) -> dict[str, int]:
        """A mapping of patterns to ranks."""
        value = self._content.get(option) or {}
        if not (
            isinstance(value, dict)
            and len(value) <= MAX_ENTRIES
            and all(type(item) is int and 1 <= item <= MAX_RANK for item in value.values())
        ):
            self._wrong(option, f"an object of integers from 1 to {MAX_RANK}")
            return {}
        return dict(value)

    def numbers(self, option: str) -> dict[str, float]:
        """A mapping of patterns to finite numbers."""
        value = self._content.get(option) or {}
        if not (
            isinstance(value, dict)
            and len(value) <= MAX_ENTRIES
            and all(_is_number(item) for item in value.values())
        ):
            self._wrong(option, "an object of finite numbers")
            return {}
        return {key: float(item) for key, item in value.items()}

    def model_class(self) -> str | None:
        """The class that ``auto_mapping`` says the adapter was made on."""
        value = self._content.get("auto_mapping")
        if value is None:
            return None
        name = value.get("base_model_class") if isinstance(value, dict) else None
        if not (isinstance(name, str) and len(name) <= 200):
            self._wrong("auto_mapping", 'an object with "base_model_class", or null')
            return None
        return name


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and abs(float(value)) < 1e9
    except OverflowError:
        return False
