"""What expressions of Prometheus name: series with their labels, read without a parser of its
whole language, which `promtool` has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SUFFIXES: Final = ("_bucket", "_count", "_sum")
_SELECTOR: Final = re.compile(r"\b(hira_\w+|up)\b(?:\{([^}]*)\})?")
_MATCHER: Final = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPED: Final = re.compile(r"\bby\s*\(([^)]*)\)")
ADDED: Final = frozenset({"job", "instance"})  # by Prometheus, when it scrapes


@dataclass(frozen=True, slots=True)
class Series:
    """A selector: the name as it is written, its matchers by label, and what it is grouped by.

    A grouping counts for every selector of its expression, so an expression must not join metrics
    that have other labels.
    """

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value
    grouped: frozenset[str]

    @property
    def labels(self) -> frozenset[str]:
        """Those that the metric must have."""
        return (frozenset(label for label, _, _ in self.matchers) | self.grouped) - ADDED


def series_of(expression: str) -> list[Series]:
    """Every selector of an expression."""
    grouped = frozenset(
        name.strip() for group in _GROUPED.findall(expression) for name in group.split(",")
    ) - {""}
    return [
        Series(name, tuple(_MATCHER.findall(matchers)), grouped)
        for name, matchers in _SELECTOR.findall(expression)
    ]


def filled(expression: str, *, interval: str, variables: Mapping[str, str]) -> str:
    """An expression of a dashboard with its variables put in."""
    expression = expression.replace("$__rate_interval", interval)
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression
