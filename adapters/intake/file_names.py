"""What the files of an adapter are called; without torch, so that the command line may read it."""

from __future__ import annotations

from typing import Final

CARD_FILE: Final = "README.md"  # the model card

# What a file system says of the files of a folder, in the order of names: name, inode, bytes, and
# when content and inode last changed, in ns. Nobody but the kernel sets the last.
Stamp = tuple[tuple[str, int, int, int, int], ...]
