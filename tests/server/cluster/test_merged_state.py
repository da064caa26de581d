"""Several engines as one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.cluster.merged_state import merged

figures = st.fixed_dictionaries(
    {
        "queue_depth": st.dictionaries(st.sampled_from(["encode", "generate"]), st.integers(0, 9)),
        "residency": st.dictionaries(
            st.sampled_from("abc"), st.sampled_from(["device", "host", "loading"])
        ),
        "quarantined": st.dictionaries(
            st.sampled_from("abc"), st.tuples(st.floats(0, 9), st.just("why"))
        ),
        "device": st.sampled_from(["cpu", "cuda:0"]),
    }
)


@given(st.lists(figures, min_size=1, max_size=4))
def test_counts_add_up_and_the_best_place_is_told(snapshots: list[dict[str, object]]) -> None:
    found = merged(snapshots)
    for key in ("encode", "generate"):
        total = sum(one["queue_depth"].get(key, 0) for one in snapshots)  # type: ignore[attr-defined]
        assert found["queue_depth"].get(key, 0) == total
    for version in "abc":
        tiers = {one["residency"].get(version) for one in snapshots} - {None}  # type: ignore[attr-defined]
        best = next((one for one in ("device", "host", "loading") if one in tiers), None)
        assert found["residency"].get(version) == best
        until = [one["quarantined"][version] for one in snapshots if version in one["quarantined"]]  # type: ignore[index,operator]
        assert found["quarantined"].get(version) == (max(until) if until else None)
    assert found["device"] == snapshots[0]["device"]


def test_nothing_said_is_nothing_known() -> None:
    assert merged([]) == {}
