"""One way of logging for every process: to standard error, a line each, no keys, no bodies.

As text, or as a JSON object with what is known of the call that the line belongs to.
"""

from __future__ import annotations

import logging
import sys
from typing import Final, Literal

from pythonjsonlogger.json import JsonFormatter

from server.edge.admit.callers import current_caller

TEXT_FORMAT: Final = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
JSON_FORMAT: Final = "%(levelname)s %(processName)s %(name)s %(message)s"
JSON_NAMES: Final = {
    "levelname": "level",
    "processName": "process",
    "name": "logger",
    "exc_info": "traceback",
}


class CallFields(logging.Filter):
    """Gives each record what is known of the call that is being answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True: nothing is left out."""
        caller = current_caller()
        for name, value in {} if caller is None else caller.log_fields().items():
            if value is not None and not hasattr(record, name):
                setattr(record, name, value)
        return True


class CallJson(JsonFormatter):
    """A record as JSON, without what is not known."""

    def process_log_record(self, log_data: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in log_data.items() if value is not None}


def log_handler(form: Literal["text", "json"]) -> logging.Handler:
    """Where a process logs to."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "text":
        handler.setFormatter(logging.Formatter(TEXT_FORMAT))
        return handler
    handler.addFilter(CallFields())
    handler.setFormatter(
        CallJson(JSON_FORMAT, rename_fields=JSON_NAMES, timestamp="time", json_ensure_ascii=False)
    )
    return handler


def configure(level: str, *, access: bool, form: Literal["text", "json"] = "text") -> None:
    """Log from ``level`` up; LitServe, which logs to standard output by itself, joins in."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(log_handler(form))
    root.setLevel(level.upper())
    theirs = logging.getLogger("litserve")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(max(logging.WARNING, root.level))
    # It warns of kernels that this server does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("server.access").setLevel(logging.INFO if access else logging.CRITICAL)
