"""What is told of errors that others raise."""

from __future__ import annotations

import pytest

from adapters.errors import in_a_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("Error [CUDA]:\n  out of room\n"), "RuntimeError: Error [CUDA]: out of room"),
        (KeyError(), "KeyError"),
        (ValueError("ends in: "), "ValueError: ends in:"),
        (OSError("x" * 5000), f"OSError: {'x' * 291}"),
    ],
)
def test_an_error_is_told_in_one_short_line(error: Exception, line: str) -> None:
    assert in_a_line(error) == line
