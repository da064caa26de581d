"""The script `hira`: sees that the packages it is about to import are this project's, then runs.

`adapters` and `server` are plain words, and another distribution may install a package of the same
name over ours or before it. Imports nothing of either but this folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

from server.cli.layout import fail

# Stands in the first line of the `__init__.py` of every package that this project installs.
PACKAGE_MARK: Final = "Part of hira-server:"
PACKAGES: Final = ("adapters", "server")


def refuse_strangers() -> None:
    """End the command when a package of ours is shadowed, or overwritten, by another's.

    Raises:
        SystemExit: With status 1, after one fault that names the other distribution.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is not None and PACKAGE_MARK in _first_line(Path(origin)):
            continue
        fail(
            f"another package stands in the place of hira-server's `{name}`",
            found=f"{origin or f'no {name}/__init__.py'}{_owners(name)}",
            expected=f"the package `{name}` that hira-server installs",
            fix="install hira-server into a virtual environment of its own",
        )


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _owners(name: str) -> str:
    """The other distributions that have a package of this name, as the end of a sentence."""
    owners = sorted(set(importlib.metadata.packages_distributions().get(name, ())))
    others = [one for one in owners if one != "hira-server"]
    return f", of {' and '.join(others)}" if others else ""


def main() -> None:
    """The entry point of the `hira` script."""
    refuse_strangers()
    from server.cli.main import main as run

    run()
