"""What both lanes of an engine share of the device where their steps are captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.base.captured_steps import CapturedSteps, GraphPool
from server.encoding import static_batch
from server.engine.engine import Engine
from server.generation import static_step
from tests.stand import tiny_bases


def test_both_lanes_capture_into_one_pool_and_leave_room_for_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[GraphPool | None, int]] = []

    def made(device: torch.device, pool: GraphPool | None, spare_bytes: int) -> CapturedSteps:
        given.append((pool, spare_bytes))
        return CapturedSteps(device, pool, spare_bytes)

    for module in (static_step, static_batch):
        monkeypatch.setattr(module, "CapturedSteps", made)
    base = tiny_bases.base_folder(tmp_path, "llama")
    changes: dict[str, Any] = {"max_sequences": 2, "max_batch_tokens": 64, "prefill_tokens": 32}
    options = tiny_bases.options(
        base, tmp_path / "store", decode_steps="static", encode_batches="static", **changes
    )
    Engine.build(options).close()
    (one, first), (other, second) = given
    assert one is not None
    assert one is other
    budgets = options.device_bytes + options.folded_bytes + options.head_bytes
    for spare in (first, second):
        assert budgets < spare < budgets + (1 << 20)
