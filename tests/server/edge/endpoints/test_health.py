"""What readiness says of a worker that is there."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from server.edge.endpoints.health import HealthEndpoints
from server.edge.link.worker_state import WorkerState


@pytest.mark.parametrize(
    ("busy_s", "status"), [(0.0, "ready"), (150.0, "ready"), (299.0, "ready"), (301.0, "stuck")]
)
def test_step_is_stuck_when_the_main_process_would_end_it_and_not_before(
    busy_s: float, status: str
) -> None:
    now = time.monotonic()
    state = WorkerState(0, "first", 7, now, busy_s)
    service: Any = SimpleNamespace(
        settings=SimpleNamespace(max_step_s=300.0),
        dispatcher=SimpleNamespace(status="ready", state=lambda: state),
    )
    found, _ = HealthEndpoints(service, "1").readiness()
    assert found.removeprefix("worker_") == status
