"""What may be a name, and what is said of one that is not there or is taken."""

from __future__ import annotations

import re
from typing import Final

from adapters.errors import AdapterNotFound, InvalidName

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise InvalidName unless ``name`` is one that an adapter may have."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            "The name is not allowed.",
            found=repr(name[:80]),
            expected="1 to 64 of a-z, 0-9, dot, dash and underscore, first a letter or digit",
            fix="Choose another name.",
        )


def name_not_found(name: str) -> AdapterNotFound:
    """The error for a name that is not there."""
    return AdapterNotFound(
        f"There is no adapter {name[:80]}.",
        found=name[:80],
        expected="a registered name",
        fix="GET /v1/models lists the names.",
    )
