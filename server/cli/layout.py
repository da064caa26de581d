"""How every command says what is wrong: a line, and below it what was found, expected, and the fix.

hira: the base model's folder does not exist
  found     --base ./modle
  expected  a folder with config.json and safetensors, or a hub id such as org/name
  fix       did you mean ./model?
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn

FAILED: Final = 1
MISUSED: Final = 2
FAULT_PARTS: Final = ("field", "found", "expected", "fix")


def print_fault(text: str, parts: Mapping[str, Any] | None = None) -> None:
    """One fault on standard error; of ``parts``, those of ``FAULT_PARTS`` that say something."""
    print(f"hira: {text}", file=sys.stderr)
    for part in FAULT_PARTS:
        value = (parts or {}).get(part)
        if value:
            print(f"  {part:9} {value}", file=sys.stderr)


def fail(text: str, status: int = FAILED, **parts: str | None) -> NoReturn:
    """End the command with one fault.

    Raises:
        SystemExit: Always, with ``status``.
    """
    print_fault(text, parts)
    raise SystemExit(status)
