"""The version of this package, also when it runs from its source folder without being installed."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    """As the installed distribution says, or ``0+source``."""
    try:
        return importlib.metadata.version("hira-server")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
