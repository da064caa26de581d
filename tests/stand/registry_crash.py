"""Kills a process that registers, replaces and removes, and looks at what it left.

`python -m tests.stand.registry_crash 50` does it fifty times and prints what it found wrong.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from adapters.errors import AdapterNotFound
from adapters.registry.registry import Registry
from adapters.registry.store import Store, version_of
from tests.stand.folders import hira_folder, small_base


def work(root: Path, folders: list[Path], seed: int) -> None:
    """Change names at random for ever; a line in a log before and after each change."""
    torch.set_num_threads(1)
    log = (root / "log").open("a", buffering=1)
    registry = Registry(root / "registry.sqlite", Store(root / "store"))
    base = small_base()
    versions = [version_of(folder) for folder in folders]
    rng = random.Random(seed)
    print("ready", file=log)
    while True:
        name = f"n{rng.randrange(4)}"
        choice = rng.randrange(len(folders) + 1)
        wanted = versions[choice] if choice < len(folders) else "-"
        print(f"begin {name} {wanted}", file=log)
        if choice < len(folders):
            registry.register(name, folders[choice], base, source="x", replace=True)
        else:
            with contextlib.suppress(AdapterNotFound):
                registry.remove(name)
            registry.collect_garbage(grace_s=0)
        print(f"done {name} {wanted}", file=log)


def crash_once(root: Path, folders: list[Path], seed: int) -> list[str]:
    """Run ``work`` in a process of its own, kill it at a random moment, restart, and compare.

    Returns:
        What is wrong: acknowledged changes that are lost, unacknowledged ones that are half there,
        bytes that nobody names. Empty when all is well.
    """
    root.mkdir(parents=True, exist_ok=True)
    log = root / "log"
    log.touch()
    rng = random.Random(seed)
    # Forked, as libraries take seconds to load; torch must not wait for threads that stayed behind.
    child = multiprocessing.get_context("fork").Process(target=work, args=(root, folders, seed))
    child.start()
    while "ready" not in log.read_text():
        assert child.is_alive(), "the worker ended early"
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.6))
    child.kill()
    child.join()
    expected: dict[str, str] = {}
    pending: tuple[str, str] | None = None
    for line in log.read_text().splitlines():
        kind, *rest = line.split()
        if kind == "begin" and len(rest) == 2:
            pending = rest[0], rest[1]
        elif kind == "done" and len(rest) == 2:
            expected[rest[0]], pending = rest[1], None
    registry = Registry(root / "registry.sqlite", Store(root / "store"))
    wrong = [f"bytes of {name} are missing" for name in registry.check()]
    found = {record.name: record.version for record in registry.list()[0]}
    for name in {*expected, *found, *([pending[0]] if pending else [])}:
        allowed = {expected.get(name, "-")} | (
            {pending[1]} if pending and pending[0] == name else set()
        )
        if found.get(name, "-") not in allowed:
            wrong.append(f"{name} is on {found.get(name, '-')}, expected one of {sorted(allowed)}")
    needed = set(found.values()) | registry.versions_kept()
    wrong += [f"orphan bytes {one}" for one in registry.store.versions() - needed]
    store = registry.store
    wrong += [f"damaged {one}" for one in store.versions() if not store.is_sound(one)]
    wrong += [f"left in staging: {path.name}" for path in (root / "store" / "staging").iterdir()]
    registry.close()
    return wrong


def main() -> None:
    rounds, wrong = int(sys.argv[1]), 0
    with tempfile.TemporaryDirectory() as name:
        folders = [hira_folder(Path(name) / f"adapter-{seed}", seed=seed) for seed in range(3)]
        for seed in range(rounds):
            for fault in crash_once(Path(name) / f"round-{seed}", folders, seed):
                wrong += 1
                print(f"round {seed}: {fault}")  # noqa: T201
    print(f"{rounds} kills, {wrong} faults")  # noqa: T201
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
