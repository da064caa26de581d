"""The embedded demo: a small base model and the adapters that belong to it.

This module only says where the files lie. `server.demo.train` made them.
"""

from pathlib import Path
from typing import Final

BASE_DIR: Final[Path] = Path(__file__).resolve().parent / "base"
ADAPTERS_DIR: Final[Path] = Path(__file__).resolve().parent / "adapters"

__all__ = ["ADAPTERS_DIR", "BASE_DIR"]
