"""What is wrong with an input, and the checks that need no tokenizer to see it."""

from __future__ import annotations

from typing import Final

from adapters.errors import ExplainedError

# More than these, and than so many for each token, no text has that anybody wrote: megabytes
# without a space keep a tokenizer busy for a minute, and the lists of its tokens hold up everybody.
UNCUT_CHARACTERS: Final = 1 << 17
CHARACTERS_A_TOKEN: Final = 64


class TextError(ExplainedError):
    """An input that cannot be given to the model, with what was found and expected."""

    code = "invalid_request"


class InvalidInput(TextError):
    """A text without a token, or a mask where one is needed; not Unicode; not an image."""


class InputTooSlow(TextError):
    """The request's own deadline passed while its template ran, or its grammar was checked."""

    code = "deadline_exceeded"


class InputTooLong(TextError):
    """More tokens than the base, or this server, takes."""

    code = "input_too_long"

    def __init__(
        self,
        message: str,
        *,
        limit_tokens: int,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message, found=found, expected=expected, fix=fix)
        self.limit_tokens = limit_tokens


def check_unicode(text: str, index: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"Input {index} is not Unicode text.",
            found=f"a lone surrogate at character {error.start}",
            expected="text that can be written as UTF-8",
            fix="Decode the bytes properly before sending them.",
        ) from error


def check_characters(text: str, index: int, tokens: int) -> None:
    """Refuse what is left of a text, where it was cut, if it cannot be tokenized in time."""
    most = most_characters(tokens)
    if len(text) > most:
        raise InputTooLong(
            f"Input {index} is too long.",
            found=f"{len(text)} characters, most of them without a space or an end of line",
            expected=f"at most {most} characters in which there is no place to cut",
            fix="Cut it before it is sent.",
            limit_tokens=tokens,
        )


def most_characters(tokens: int) -> int:
    return max(UNCUT_CHARACTERS, CHARACTERS_A_TOKEN * tokens)


def no_room(found: str, max_new_tokens: int, max_tokens: int) -> InputTooLong:
    return InputTooLong(
        "The prompt and the tokens asked for do not fit the context.",
        found=f"{found} + {max_new_tokens} new tokens",
        expected=f"at most {max_tokens} tokens together",
        limit_tokens=max_tokens,
        fix="Shorten the prompt or lower max_new_tokens.",
    )


def lost_text(index: int) -> InvalidInput:
    return InvalidInput(
        f"Nothing of input {index} is left when it is tokenized.",
        found="a text without a token",
        expected="text that the base's vocabulary can spell",
        fix="Send text in a script that the base knows.",
    )


def too_many_tokens(index: int, found: str, max_tokens: int) -> InputTooLong:
    return InputTooLong(
        f"Input {index} has more tokens than this base takes.",
        found=found,
        expected=f"at most {max_tokens} tokens",
        fix="Send it in parts.",
        limit_tokens=max_tokens,
    )


def input_too_long(index: int, found: str, max_tokens: int) -> InputTooLong:
    return InputTooLong(
        f"Input {index} is too long.",
        found=found,
        expected=f"at most {max_tokens} tokens",
        fix='Shorten it, or send "truncation": true.',
        limit_tokens=max_tokens,
    )
