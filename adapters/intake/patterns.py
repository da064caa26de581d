"""Regular expressions that come from an adapter's configuration, matched under a time limit.

PEFT lets ``target_modules``, ``rank_pattern`` and the like be regular expressions. Here they come
from strangers, and Python's own engine can be held for hours by a short hostile one, so they run in
the ``regex`` package (a dependency of transformers, same syntax) with a limit on length and time.
"""

from __future__ import annotations

from collections.abc import Iterable

import regex  # type: ignore[import-untyped]

from adapters.errors import UnsupportedOption

MAX_PATTERN_CHARACTERS = 2_000
MATCH_LIMIT_S = 0.25


def full_match(pattern: str, text: str, *, option: str) -> bool:
    """Whether the whole of ``text`` matches ``pattern``, as PEFT's ``target_modules`` string.

    Args:
        pattern: A regular expression out of an adapter's configuration.
        text: A module path.
        option: The name of the option that the pattern came from, for the error.

    Raises:
        UnsupportedOption: The pattern is malformed, too long, or takes too long to match.
    """
    return _match(pattern, text, option)


def pattern_key(keys: Iterable[str], path: str, *, option: str) -> str | None:
    """The first of ``keys`` that is a regular expression for the end of ``path``, else None.

    Source: ``peft/utils/other.py``, ``get_pattern_key`` (which returns the path itself, and so a
    key that is the literal path, where none matches).
    """
    keys = list(keys)
    for key in keys:
        if _match(rf"(.*\.)?({key})$", path, option, anchored_end=False):
            return key
    return path if path in keys else None


def layer_index(path: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the layer that ``path`` lies in, as PEFT's ``layers_to_transform`` counts.

    Source: ``peft/tuners/tuners_utils.py``, ``check_target_module_exists``.
    """
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\."
    ]
    for expression in expressions:
        found = _compile(expression, "layers_pattern").match(path, timeout=MATCH_LIMIT_S)
        if found is not None:
            return int(found.group("idx"))
    return None


def check_pattern(pattern: str, *, option: str) -> None:
    """Raise ``UnsupportedOption`` unless ``pattern`` is a regular expression of sane length."""
    _compile(pattern, option)


def _compile(pattern: str, option: str) -> regex.Pattern[str]:
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise UnsupportedOption(
            f"A pattern in {option} is too long.",
            found=f"{len(pattern)} characters",
            expected=f"at most {MAX_PATTERN_CHARACTERS}",
            fix="List the modules by name instead.",
        )
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as cause:
        raise UnsupportedOption(
            f"A pattern in {option} is not a regular expression.",
            found=pattern[:200],
            expected="a regular expression over module paths",
            fix=str(cause)[:200] or None,
        ) from cause


def _match(pattern: str, text: str, option: str, *, anchored_end: bool = True) -> bool:
    compiled = _compile(pattern, option)
    try:
        if anchored_end:
            return compiled.fullmatch(text, timeout=MATCH_LIMIT_S) is not None
        return compiled.match(text, timeout=MATCH_LIMIT_S) is not None
    except TimeoutError as cause:
        raise UnsupportedOption(
            f"A pattern in {option} takes too long to match.",
            found=pattern[:200],
            expected=f"a match of one module path within {MATCH_LIMIT_S} s",
            fix="List the modules by name instead.",
        ) from cause
