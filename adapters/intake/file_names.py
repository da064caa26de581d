"""What the files of an adapter are called; without torch, so that the command line may read it."""

from __future__ import annotations

from typing import Final

CARD_FILE: Final = "README.md"  # the model card
