"""Turns between adapters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.generation.fair_queue import PATIENCE_ADMISSIONS, FairQueue
from server.messages import GenerateRequest


def request(name: str, version: str | None) -> GenerateRequest:
    return GenerateRequest(id=name, adapter=version, version=version, token_ids=(1, 2))


def drain(queue: FairQueue) -> list[GenerateRequest]:
    taken = []
    while len(queue):
        head = next(iter(queue.heads()))
        queue.take(head, [])
        taken.append(head)
    return taken


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=40))
def test_versions_take_turns_and_keep_their_order(versions: list[str | None]) -> None:
    queue = FairQueue()
    requests = [request(str(i), version) for i, version in enumerate(versions)]
    for each in requests:
        queue.push(each)
    taken = drain(queue)
    for version in set(versions):
        own = [r for r in requests if r.version == version]
        assert [r for r in taken if r.version == version] == own
        # Its n-th is served before any other version's (n+2)-th.
        for n, each in enumerate(own):
            before = taken[: taken.index(each)]
            assert all(sum(r.version == other for r in before) <= n + 1 for other in set(versions))
    assert queue.versions == ()


def test_a_late_version_does_not_wait_behind_a_flood() -> None:
    queue = FairQueue()
    for i in range(50):
        queue.push(request(f"flood{i}", "a"))
    queue.take(next(iter(queue.heads())), [])
    queue.push(request("one", "b"))
    assert [r.id for r in drain(queue)].index("one") <= 1


def test_removed_requests_are_gone() -> None:
    queue = FairQueue()
    for name, version in (("x", "a"), ("y", "a"), ("z", None)):
        queue.push(request(name, version))
    assert queue.remove("y")
    assert not queue.remove("y")
    assert "y" not in queue
    assert "x" in queue
    assert [r.id for r in queue.remove_version("a")] == ["x"]
    assert [r.id for r in drain(queue)] == ["z"]


def test_patience_ends_after_enough_admissions() -> None:
    queue = FairQueue()
    large = request("large", "a")
    queue.push(large)
    for i in range(PATIENCE_ADMISSIONS):
        assert not queue.is_impatient(large)
        small = request(f"small{i}", "b")
        queue.push(small)
        queue.take(small, [large])
    assert queue.is_impatient(large)
