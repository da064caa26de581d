"""What is made of the calls that a part of a cluster cut off, without a cluster."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from loadtests.cluster_kills import (
    HANG_S,
    HELD_S,
    TOLD_S,
    Broken,
    Call,
    Seen,
    asked_again_s,
    judged,
)


@pytest.mark.parametrize("part", ["engine", "node", "proxy", "http"])
def test_whoever_was_cut_off_must_be_told_in_time(part: str) -> None:
    # The first was on another replica: it is slow, and nobody's affair.
    seen = Seen([Call("predict", 9.0, 19.5, "ok"), Call("generate", 9.5, 11.0, "503 worker_lost")])
    row = judged(part, Broken(10.0, None, 30.0), seen, again=[0.5])
    assert (row["told_s"], row["cut_off"], row["faults"]) == (1.0, 1, [])
    row = judged(part, Broken(10.0, None, 30.0), seen, again=[0.5, 2 * TOLD_S])
    assert (row["told_s"], row["cut_off"]) == (2 * TOLD_S, 2)
    assert row["faults"]
    seen.calls.append(Call("generate", 9.9, 10.0 + 2 * TOLD_S, "503 worker_lost"))
    assert judged(part, Broken(10.0, None, 30.0), seen)["faults"]


@pytest.mark.parametrize("part", ["engine", "node", "proxy", "http", "postgres", "store"])
def test_a_call_that_was_answered_late_is_a_fault_if_it_was_under_way(part: str) -> None:
    soon = Call("predict", 9.0, 10.0 + HELD_S / 2, "ok")
    begun_later = Call("predict", 10.5, 11.0 + 2 * HELD_S, "ok")  # it waited for what was broken
    row = judged(part, Broken(10.0, 40.0, 1.0), Seen([soon, begun_later]))
    assert (row["held_s"], row["faults"]) == (HELD_S / 2, [])
    late = Call("generate", 9.0, 11.0 + HELD_S, "ok")
    row = judged(part, Broken(10.0, 40.0, 1.0), Seen([soon, late]))
    assert row["held_s"] == HELD_S + 1.0
    assert len(row["faults"]) == 1


def test_when_a_request_was_asked_again_is_in_the_log() -> None:
    log = """
(ServeReplica:hira:http pid=7) {"message": "Request a.1 lost its replica: its silence", "time": "2026-01-02T03:04:03.500000+00:00"}
(ServeReplica:hira:http pid=7) {"message": "Request a.2 lost its replica: its silence", "time": "2026-01-02T03:04:06.500000+00:00"}
(ServeReplica:hira:http pid=7) {"message": "ready", "time": "2026-01-02T03:04:07.000000+00:00"}
"""  # noqa: E501  # lines as they are
    killed = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    assert asked_again_s(log, killed) == [1.5]


def test_a_call_that_hangs_is_a_fault_whether_it_ended_or_not() -> None:
    seen = Seen(
        [Call("predict", 1.0, 1.0 + HANG_S, "hung")], running={1: time.monotonic() - 2 * HANG_S}
    )
    row = judged("proxy", Broken(0.5, None, 1.0), seen)
    assert row["hung"] == 2
    assert row["faults"]


def test_while_the_store_is_away_only_those_that_need_it_may_fail() -> None:
    calls = [
        Call("predict", 11.0, 11.1, "ok"),
        Call("register", 12.0, 12.1, "503 registry_unavailable"),
    ]
    assert judged("postgres", Broken(10.0, 70.0, 1.0), Seen(list(calls)))["faults"] == []
    calls.append(Call("predict", 13.0, 13.1, "503 store_unavailable"))
    assert judged("store", Broken(10.0, 70.0, 1.0), Seen(list(calls)))["faults"] == []
    assert judged("postgres", Broken(10.0, 70.0, 1.0), Seen(list(calls)))["faults"]
    assert judged("store", Broken(10.0, 70.0, 1.0), Seen([]))["faults"], "nothing was answered"
