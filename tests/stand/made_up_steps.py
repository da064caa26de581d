"""Captured steps where there is no device that captures any."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from server.base.captured_steps import CapturedSteps, StepKey


class MadeUpSteps(CapturedSteps):
    """Steps that are captured without a device; what is replayed is run."""

    def __init__(self, room_rows: int) -> None:
        super().__init__(torch.device("cpu"))
        self.room_rows = room_rows
        self.runs: dict[StepKey, Callable[[], None]] = {}
        self.refused: list[int] = []

    @property
    def possible(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[StepKey]:
        return iter(self.runs)

    def __contains__(self, key: object) -> bool:
        return key in self.runs

    def capture(self, key: StepKey, run: Callable[[], None]) -> bool:
        if key.rows > self.room_rows:
            self.refused.append(key.rows)
            return False
        run()
        self.runs[key] = run
        return True

    def replay(self, key: StepKey) -> bool:
        if key not in self.runs:
            return False
        self.runs[key]()
        return True
