"""How a load test ends: what was wrong is said, and is its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def verdict(faults: Sequence[str], figures: object = None, path: Path | None = None) -> int:
    """The exit status: 1 where something was wrong, after each fault was said.

    Args:
        faults: What was wrong, a line each.
        figures: Of the run, as JSON has them.
        path: Where they are written as well, if anywhere.
    """
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0
