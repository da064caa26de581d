"""JSON of any size, read and written so that nobody waits for it.

The library's scanner and encoder hold the interpreter for a whole text: what is read has a bound on
its values, and what is written is written in pieces. Both belong in a thread where they are large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json import JSONEncoder
from typing import Any, Final

from server.errors import Refusal

AT_ONCE_BYTES: Final = 1 << 14  # larger texts are read in a thread
AT_ONCE_VALUES: Final = 1 << 12  # larger answers are made in a thread, in pieces of so many values
VALUES_MAX: Final = 300_000  # of a body: read in a quarter of a second, whatever they are
JSON_SLICE_CHARACTERS: Final = 1 << 16
VALUE_CHARACTERS: Final = 64  # of a text that take as long as one value
_ENCODER: Final = JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parse_json(raw: bytes | str) -> Any:
    """The value of a JSON text.

    Args:
        raw: In UTF-8, UTF-16 or UTF-32, or decoded.

    Raises:
        Refusal: request_too_large for more than ``VALUES_MAX`` values.
        json.JSONDecodeError: It is no JSON.
        ValueError: It is not in its encoding, or a number is too long.
        RecursionError: It is nested without end.
    """
    text = raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw), "surrogatepass")
    if has_more_values(text, VALUES_MAX):
        raise Refusal.because(
            "request_too_large",
            "The body holds too many values.",
            found=f"more than {VALUES_MAX} commas and opening brackets outside its texts",
            expected=f"at most {VALUES_MAX}",
            fix="Send several requests; they are batched together anyway.",
        )
    return json.loads(text)


def has_more_values(text: str, most: int) -> bool:
    """Whether a JSON text has more commas and opening brackets outside its strings than ``most``.

    There is at least one for every value but one. The text is looked at in slices, between which
    other threads run.
    """
    if len(text) <= most:
        return False
    found, within, escape = 0, False, ""
    for start in range(0, len(text), JSON_SLICE_CHARACTERS):
        # Without escapes every quote opens or closes a string.
        piece = (escape + text[start : start + JSON_SLICE_CHARACTERS]).replace("\\\\", "")
        escape = "\\" if piece.endswith("\\") else ""
        parts = piece.removesuffix("\\").replace('\\"', "").split('"')
        outside = "".join(parts[within::2])
        found += sum(map(outside.count, ",[{"))
        if found > most:
            return True
        within ^= len(parts) % 2 == 0
    return False


def written(content: Any) -> bytes:
    """JSON in UTF-8, also of text that came as a lone surrogate and cannot be written so."""
    return "".join(json_pieces(content)).encode("utf-8", "replace")


def json_pieces(content: Any) -> Iterator[str]:
    """The JSON text of a value, in pieces that take a millisecond or so each."""
    if weight(content) <= AT_ONCE_VALUES or not isinstance(content, dict | list | tuple):
        yield _ENCODER.encode(content)
    elif isinstance(content, dict):
        mark = "{"
        for name, one in content.items():
            yield mark + _ENCODER.encode(name) + ":"
            yield from json_pieces(one)
            mark = ","
        yield "}"
    else:
        step = AT_ONCE_VALUES // weight(content[-1])
        mark = "["
        for start in range(0, len(content), max(1, step)):
            yield mark
            if step > 1:
                yield _ENCODER.encode(content[start : start + step])[1:-1]
            else:
                yield from json_pieces(content[start])
            mark = ","
        yield "]"


def weight(content: Any) -> int:
    """About how many values a value holds; the last of a list stands for all of it."""
    if isinstance(content, dict):
        return 1 + sum(map(weight, content.values()))
    if isinstance(content, list | tuple):
        return 1 + (len(content) * weight(content[-1]) if content else 0)
    return 1 + len(content) // VALUE_CHARACTERS if isinstance(content, str) else 1
