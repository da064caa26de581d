"""What the worker says of itself comes back as it was said."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.edge.link.worker_state import WorkerState, read_state, state_path, write_state

VERSIONS = st.text("0123456789abcdef", min_size=1, max_size=32)
TIERS = st.sampled_from(["device", "host", "loading", "failed"])


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tiers=st.dictionaries(VERSIONS, TIERS, max_size=50))
def test_tiers_come_back_by_version(tmp_path: Path, tiers: dict[str, str]) -> None:
    state = WorkerState(0, "first", 1, 2.0, 0.0, {"slots": {"used": 3}, "residency": tiers})
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert found is not None
    assert dict(found.snapshot["residency"]) == tiers
    assert len(found.snapshot["residency"]) == len(tiers)
    assert found.snapshot["slots"] == {"used": 3}
    assert state.snapshot["residency"] is tiers, "what was said is not changed"


def test_a_state_that_is_no_state_is_none(tmp_path: Path) -> None:
    write_state(tmp_path, WorkerState(0, "first", 1, 2.0, 0.0, {"residency": {"a": "host"}}))
    path = state_path(tmp_path, 0)
    path.write_text(path.read_text().replace('{"host": "a"}', "7"))
    assert read_state(tmp_path) is None
