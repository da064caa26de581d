"""What a library raised, in one line for the log or an operator."""

from __future__ import annotations


def error_line(error: BaseException) -> str:
    """Class and text of an error, in 200 characters: some have no text, and some a page of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")[:200]
