"""The order in which processes that share the tests take up its modules.

A module stays in one process. One that takes long and comes last leaves the others without work, so
those come first.
"""

from __future__ import annotations

import pytest

LONG_MARKS = ("http", "long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Modules with a test that is marked as long, or starts a server, before all others."""
    if not hasattr(config, "workerinput"):  # this process has all of them
        return
    long = {one.path for one in items if any(one.get_closest_marker(mark) for mark in LONG_MARKS)}
    items.sort(key=lambda one: one.path not in long)
