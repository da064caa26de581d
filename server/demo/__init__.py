"""The embedded demo: a small base model and the adapters that belong to it, as data.

This module only says where the files lie. `python -m server.training.demo` makes the adapters.
"""

from pathlib import Path
from typing import Final

BASE_DIR: Final[Path] = Path(__file__).resolve().parent / "base"
ADAPTERS_DIR: Final[Path] = Path(__file__).resolve().parent / "adapters"

__all__ = ["ADAPTERS_DIR", "BASE_DIR"]
