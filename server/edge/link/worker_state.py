"""What the worker says about itself, in files of the run folder that any process may read."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from server.stages import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker says about itself, in a file that it replaces every second."""

    worker: int
    epoch: str
    pid: int
    beat: float  # time.monotonic() of the last writing: one clock for all processes
    busy_s: float  # how long the present step has taken; 0 between steps
    snapshot: Mapping[str, Any] = field(default_factory=dict)
    queue_silent_s: float = 0.0  # how long the queues' process has not answered


def state_path(run_dir: Path, worker: int) -> Path:
    return run_dir / f"worker-{worker}.json"


def fault_path(run_dir: Path, worker: int) -> Path:
    """Where a worker that cannot start says why, in one line."""
    return run_dir / f"worker-{worker}.fault"


def stage_path(run_dir: Path, worker: int) -> Path:
    """Where a worker that starts says how far it is."""
    return run_dir / f"worker-{worker}.stage"


def write_stage(run_dir: Path, stage: Stage, worker: int = 0) -> None:
    """Say how far the start is; a folder that cannot be written to hides it, no more."""
    with suppress(OSError):
        replace_text(stage_path(run_dir, worker), json.dumps([stage.name, stage.done, stage.total]))


def read_stage(run_dir: Path, worker: int = 0) -> Stage | None:
    """How far a worker that starts is, or None where it has not said."""
    try:
        name, done, total = json.loads(stage_path(run_dir, worker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Stage(str(name), int(done), int(total))


def stopping_path(run_dir: Path) -> Path:
    """There once running requests have been ended: a worker told to end leaves the rest undone."""
    return run_dir / "stopping"


def replace_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write a whole file so that readers see the old one or the new one, never a half."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class TiersByVersion(Mapping[str, str]):
    """Tiers by version out of versions by tier, worked out when somebody asks.

    Every process reads the state each second, and few ask for this. Of ten thousand adapters in
    memory it would take longer than all else; as one line of versions for each tier it does not.
    """

    def __init__(self, lines: Mapping[str, str]) -> None:
        self._lines = lines
        self._tiers: dict[str, str] | None = None

    @staticmethod
    def lines_of(tiers: Mapping[str, str]) -> dict[str, str]:
        """One line of versions for each tier; versions have no spaces."""
        by_tier: dict[str, list[str]] = {}
        for version, tier in tiers.items():
            by_tier.setdefault(tier, []).append(version)
        return {tier: " ".join(versions) for tier, versions in by_tier.items()}

    def _all(self) -> dict[str, str]:
        if self._tiers is None:
            self._tiers = {
                version: tier for tier, line in self._lines.items() for version in line.split()
            }
        return self._tiers

    def __getitem__(self, version: str) -> str:
        return self._all()[version]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def write_state(run_dir: Path, state: WorkerState) -> None:
    told = {field.name: getattr(state, field.name) for field in fields(state)}
    if "residency" in state.snapshot:
        lines = TiersByVersion.lines_of(state.snapshot["residency"])
        told["snapshot"] = {**state.snapshot, "residency": lines}
    replace_text(state_path(run_dir, state.worker), json.dumps(told))


def read_state(run_dir: Path, worker: int = 0) -> WorkerState | None:
    """The worker's last word, or None when it has not spoken, or cannot be understood.

    A word that cannot be read is none: whoever waits for it sees a silent worker and does what is
    due then, rather than end himself.
    """
    try:
        state = WorkerState(**json.loads(state_path(run_dir, worker).read_text(encoding="utf-8")))
        if "residency" in state.snapshot:
            tiers = TiersByVersion(dict(state.snapshot["residency"]))
            state = replace(state, snapshot={**state.snapshot, "residency": tiers})
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.error("The worker's state cannot be read: %s", error)
        return None
