"""Registers many tiny adapters for a server that is started afterwards: run by
``loadtests.many_adapters`` as a process of its own.

They are registered as a server does it, checked and stored one by one, but the disk is not waited
for: what is lost in a crash is made again. All names are put on their versions in one transaction.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from adapters.registry.records import WantedName
from adapters.registry.registry import Registry
from adapters.registry.store import Store
from loadtests.tiny import make_base, make_classifier, renumber
from server.base.digest import checkpoint_digest
from server.base.load import signature_of
from server.options import EngineOptions
from server.settings import load_settings


def main(root: Path, count: int) -> None:
    """Make ``root/base``, and ``root/data`` with ``count`` adapters on it, as far as they are not
    there yet."""
    os.fsync = lambda _: None  # type: ignore[assignment]
    base = root / "base"
    if not base.exists():
        make_base(base)
    settings = load_settings({"base": str(base), "data_dir": root / "data", "dtype": "fp32"})
    options = EngineOptions(str(base), settings.store_dir, root / "none", dtype="fp32")
    signature = replace(signature_of(options), digest=checkpoint_digest(base))
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    registry = Registry(settings.database, Store(settings.store_dir))
    present = registry.records()
    wanted: list[WantedName] = []
    with tempfile.TemporaryDirectory() as folder:
        source = make_classifier(Path(folder) / "adapter", seed=0)
        for number in range(count):
            name = f"many-{number:05}"
            if name not in present:
                record = registry.stage(renumber(source, seed=number), signature)
                wanted.append(WantedName(name, record, "loadtests.many_adapters"))
    registry.apply(wanted)
    registry.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
