"""One way of logging for every process: to standard error, a line each, no keys, no bodies."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"


def configure(level: str, *, access: bool) -> None:
    """Log from ``level`` up; LitServe, which logs to standard output by itself, joins in."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    root.addHandler(handler)
    root.setLevel(level.upper())
    theirs = logging.getLogger("litserve")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(max(logging.WARNING, root.level))
    # It warns of kernels that this server does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("server.access").setLevel(logging.INFO if access else logging.CRITICAL)
