"""What a registered adapter that nobody asks for costs a process: run by ``residency`` as a process
of its own, with the folder of the stock; prints bytes by adapter as JSON."""

from __future__ import annotations

import gc
import json
import pickle
import sys
from pathlib import Path

import psutil

from adapters.registry.registry import Registry
from adapters.registry.store import Store
from server.engine.snapshot import NamedVersions
from server.messages import Pin


def main(root: Path) -> None:
    registry = Registry(root / "registry.db", Store(root / "store"))
    process = psutil.Process()
    registry.generation()  # what a connection costs is not an adapter's
    gc.collect()
    before = process.memory_info().rss
    count = registry.list()[1]
    gc.collect()
    read = process.memory_info().rss
    message = pickle.dumps(Pin((), named=tuple(sorted(registry.versions()))))
    gc.collect()
    told = process.memory_info().rss
    names = NamedVersions()
    names.named = frozenset(pickle.loads(message).named)
    gc.collect()
    knows = process.memory_info().rss
    assert len(names.named) == count
    print(
        json.dumps(
            {"HTTP process": (read - before) / count, "worker": max(0.0, (knows - told) / count)}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
