from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import CorruptFile, MissingTensors, NonFinite, SlotNotResident, StoreFull
from adapters.layers.inject import inject
from adapters.residency.packing import pack_adapter
from adapters.residency.slots import LARGE_BYTES, LOADS, Residency
from adapters.residency.tiers import PASS_S
from adapters.segments import from_rows
from tests.stand.clock import FakeClock
from tests.stand.residencies import ONE, WIDTH, Disk, fetch, read_in, residency, weights_of
from tests.stand.tiny_models import FakeWeights, build, random_factors
from tests.stand.waits import TIMEOUT_S, until


def test_prefetched_version_gets_a_slot_that_serves_it() -> None:
    with residency() as (made, disk):
        assert made.state("a") == "absent"
        fetch(made, "a", "b")
        held = made.lease(["a", "b"])
        assert set(held) == {"a", "b"}
        assert len(set(held.values())) == 2
        x = torch.randn(2, WIDTH)
        with torch.no_grad(), disk.adapted.batch(from_rows([held["a"], held["b"]])):
            found = disk.adapted.model(x)
        layer = disk.adapted.model[0]  # type: ignore[index]
        for row, version in enumerate("ab"):
            factors = weights_of(version, disk.adapted).factors["0"]
            merged = layer.weight * (1 + factors.b @ factors.a)
            torch.testing.assert_close(found[row], merged @ x[row] + layer.bias)
        made.release(held)


def test_prefetch_does_not_wait_for_the_load() -> None:
    with residency() as (made, disk):
        fetch(made, "warm")
        disk.gate.clear()
        made.prefetch("cold")
        assert made.state("cold") == "loading"
        assert made.lease(["warm"])
        made.release(["warm"])
        disk.gate.set()
        fetch(made, "cold")
        assert made.state("cold") == "ready"


def test_asking_again_loads_once() -> None:
    with residency() as (made, disk):
        disk.gate.clear()
        for _ in range(5):
            made.prefetch("a")
        disk.gate.set()
        fetch(made, "a", "a")
        assert disk.reads == ["a"]


def test_time_of_a_load_counts_from_the_first_wish_and_only_where_it_was_on_disk() -> None:
    clock = FakeClock()
    with residency(slots=1, clock=clock) as (made, disk):
        disk.gate.clear()
        made.prefetch("a")
        clock.advance(2.0)
        made.prefetch("a")
        clock.advance(3.0)
        disk.gate.set()
        fetch(made, "a")
        assert made.take_load_seconds() == [5.0]
        assert made.take_load_seconds() == [], "each is told once"
        disk.broken.add("broken")
        fetch(made, "b", "a", "broken")  # a comes back from host memory
        assert disk.reads == ["a", "b", "broken"]
        assert made.take_load_seconds() == [0.0], "that of b"


def test_lease_needs_every_version_ready_and_holds_none_otherwise() -> None:
    with residency(slots=1) as (made, _):
        fetch(made, "a")
        with pytest.raises(SlotNotResident):
            made.lease(["a", "missing"])
        fetch(made, "b")  # a was not held, so it could leave
        assert made.state("b") == "ready"


def test_least_recently_used_version_leaves_first() -> None:
    with residency(slots=2, host_bytes=0) as (made, _):
        fetch(made, "a", "b")
        made.release(made.lease(["a"]))
        fetch(made, "c")
        assert {v: made.state(v) for v in "abc"} == {"a": "ready", "b": "absent", "c": "ready"}


def test_more_versions_than_slots_queue_behind_those_in_use() -> None:
    with residency(slots=2, grace_s=1.0, clock=FakeClock()) as (made, disk):
        fetch(made, "a", "b")
        made.lease(["a", "b"])
        read_in(made, disk, *"cde")
        assert [made.state(v) for v in "cde"] == ["loading"] * 3
        made.release(["a"])
        until(lambda: made.state("c") == "ready")
        disk.turn(made)
        assert [made.state(v) for v in "bde"] == ["ready", "loading", "loading"]


def test_pinned_version_stays_and_is_fetched_unasked() -> None:
    with residency(slots=2) as (made, _):
        made.set_pinned(["p"])
        until(lambda: made.state("p") == "ready")
        for version in "abcd":
            fetch(made, version)
            assert made.state("p") == "ready"
        made.set_pinned([])
        fetch(made, "e", "f")
        assert made.state("p") == "absent"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_pins_beyond_the_slots_leave_one_to_the_others(
    slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    pins = ["p", "q", "r"]
    with residency(slots=slots) as (made, _):
        made.set_pinned(pins)
        for turn in range(2):
            for version in (*pins, f"a{turn}", f"b{turn}"):
                fetch(made, version)
                assert made.state(version) == "ready"
        snapshot = made.snapshot()
        assert snapshot.pinned == tuple(pins[: slots - 1])
        assert snapshot.pins_without_room == tuple(pins[slots - 1 :])
        assert all(snapshot.tiers[version] == "device" for version in snapshot.pinned)
        assert caplog.text.count("no room to pin") == 1


def test_pins_beyond_their_bytes_leave_a_quarter_to_the_others() -> None:
    pins = ["p", "q", "r", "s"]
    with residency(slots=8, device_bytes=4 * ONE) as (made, _):
        made.set_pinned(pins)
        for version in (*pins, "a", "b"):
            fetch(made, version)
            assert made.state(version) == "ready"
        until(lambda: made.snapshot().pinned == ("p", "q", "r"))
        assert made.state("a") == "absent"
        assert all(made.state(version) == "ready" for version in "pqr")


def test_pins_give_way_to_a_version_that_fits_in_no_other_way() -> None:
    with residency(slots=4, device_bytes=4 * ONE) as (made, disk):
        disk.ranks["big"] = 6  # three of four units
        made.set_pinned(["p", "q", "r"])
        until(lambda: all(made.state(version) == "ready" for version in "pqr"))
        fetch(made, "big")
        assert made.state("big") == "ready"
        assert made.state("p") == "ready"
        fetch(made, "q", "r")
        assert [made.state(version) for version in "pqr"] == ["ready"] * 3


def test_held_version_stays_but_is_not_used() -> None:
    with residency(slots=2) as (made, disk):
        fetch(made, "a", "b")
        held = made.hold(["a", "b", "missing"])
        assert set(held) == {"a", "b"}
        read_in(made, disk, "c")
        assert made.state("c") == "loading"
        made.use(["a"])
        made.release(held)
        until(lambda: made.state("c") == "ready")
        assert (made.state("a"), made.state("b")) == ("ready", "absent")


def test_version_larger_than_the_device_fails_and_others_go_on() -> None:
    with residency(device_bytes=3 * ONE) as (made, disk):
        disk.ranks["big"] = 8
        fetch(made, "a", "big", "b")
        assert made.state("big") == "failed"
        assert isinstance(made.error("big"), StoreFull)
        assert made.state("a") == made.state("b") == "ready"


def test_failure_keeps_its_error_and_a_new_prefetch_tries_again() -> None:
    with residency() as (made, disk):
        heard: list[str] = []
        made.on_ready(heard.append)
        disk.broken.add("a")
        fetch(made, "a", "b")
        assert made.state("a") == "failed"
        assert isinstance(made.error("a"), CorruptFile)
        assert made.snapshot().failures == 1
        disk.broken.clear()
        fetch(made, "a")
        assert made.state("a") == "ready"
        assert made.error("a") is None
        until(lambda: len(heard) == 3)
        assert heard == ["a", "b", "a"]


def test_listener_that_raises_does_not_stop_the_loader() -> None:
    with residency() as (made, _):

        def raising(version: str) -> None:
            raise RuntimeError(version)

        made.on_ready(raising)
        fetch(made, "a", "b")
        assert made.state("b") == "ready"


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), 1e30])
def test_non_finite_adapter_fails_before_it_reaches_a_slot(spoiled: float) -> None:
    with residency() as (made, disk):

        def spoil(_: str, weights: Any) -> Any:
            entry = weights.factors["0"]
            return replace(
                weights, factors={"0": replace(entry, a=entry.a * 0 + spoiled, b=entry.b * 1e30)}
            )

        disk.changed = spoil
        fetch(made, "a")
        assert isinstance(made.error("a"), NonFinite)
        assert not disk.adapted.layers["0"].slots


def test_dropped_version_leaves_at_once_or_with_its_last_lease() -> None:
    with residency() as (made, _):
        fetch(made, "a", "b")
        made.lease(["a"])
        made.drop("a")
        made.drop("b")
        made.drop("unknown")
        assert made.state("a") == "ready"
        assert made.state("b") == "absent"
        assert made.snapshot().tiers == {"a": "device"}
        made.release(["a"])
        assert made.snapshot().tiers == {}
        assert made.snapshot().slots_used == 0


def test_evicted_version_comes_back_from_the_host_without_a_read() -> None:
    with residency(slots=1) as (made, disk):
        fetch(made, "a", "b")
        assert made.snapshot().tiers == {"a": "host", "b": "device"}
        fetch(made, "a")
        assert disk.reads == ["a", "b"]
        assert made.state("a") == "ready"


def test_host_tier_stays_in_its_budget() -> None:
    head = 2 * 8 * 4
    with residency(slots=1, host_bytes=2 * (ONE + head) + head) as (made, _):
        for version in "abcdef":
            fetch(made, version)
        snapshot = made.snapshot()
        assert snapshot.tiers == {"d": "host", "e": "host", "f": "device"}
        assert snapshot.host_bytes == 2 * (ONE + head) + head
        assert snapshot.device_bytes == ONE


def test_just_placed_version_is_kept_for_whoever_asked() -> None:
    clock = FakeClock()
    with residency(slots=1, grace_s=0.2, clock=clock) as (made, disk):
        fetch(made, "a")
        read_in(made, disk, "b")
        assert (made.state("a"), made.state("b")) == ("ready", "loading")
        clock.advance(0.19)
        disk.turn(made)
        assert made.state("b") == "loading"
        clock.advance(0.02)  # a was never leased: its grace ends, and the loader finds it by itself
        until(lambda: made.state("b") == "ready")
        assert made.state("a") == "absent"


def test_grace_ends_with_the_first_lease() -> None:
    with residency(slots=1, grace_s=1.0, clock=FakeClock()) as (made, disk):
        fetch(made, "a")
        read_in(made, disk, "b")
        assert made.lease(["a"])
        disk.turn(made)
        assert made.state("b") == "loading"
        made.release(["a"])
        until(lambda: made.state("b") == "ready")


def test_leasing_many_versions_through_few_slots_makes_progress() -> None:
    # The clock stands, so no grace ends: whatever is placed waits until it was leased.
    with residency(slots=2, grace_s=1.0, clock=FakeClock()) as (made, _):
        pending = [f"v{i}" for i in range(12)]
        for version in pending:
            made.prefetch(version)

        def lease_those_that_are_ready() -> bool:
            for version in [v for v in pending if made.state(v) == "ready"]:
                made.lease([version])
                made.release([version])
                pending.remove(version)
            return not pending

        until(lease_those_that_are_ready)


def test_resident_adapter_costs_its_tensors_in_the_compute_dtype() -> None:
    adapted = inject(build("llama", quantization="nf4", dtype=torch.bfloat16))
    paths = [path for path in adapted.signature.layers if path.endswith("_proj")]
    factors = random_factors(adapted.signature, paths, rank=8)
    tensors = sum(f.a.numel() + f.b.numel() for f in factors.values()) * 2
    fake: Any = FakeWeights(factors)
    packed = pack_adapter(fake, torch.bfloat16, torch.device("cpu"))
    assert tensors <= packed.nbytes <= 1.05 * tensors
    on_device = packed.to_device(torch.device("cpu"))
    assert packed.host_nbytes(in_slot=True) == 0
    entries: list[Any] = [*on_device.values(), *packed.weights.factors.values()]
    buffers = {t.untyped_storage().data_ptr() for entry in entries for t in (entry.a, entry.b)}
    assert len(buffers) == 1
    for path, entry in on_device.items():
        assert torch.equal(entry.a, factors[path].a.bfloat16())
        assert entry.a.data_ptr() % 64 == entry.b.data_ptr() % 64 == 0


def test_adapter_without_factors_is_refused() -> None:
    empty: Any = FakeWeights({})
    with pytest.raises(MissingTensors):
        pack_adapter(empty, torch.float32, torch.device("cpu"))


def test_weights_keep_the_head_and_the_factors() -> None:
    with residency(dtype=torch.bfloat16) as (made, disk):
        fetch(made, "a")
        weights = made.weights("a")
        assert torch.equal(weights.head["score.weight"], torch.ones(2, 8))
        expected = weights_of("a", disk.adapted).factors["0"].a.bfloat16()
        assert torch.equal(weights.factors["0"].a, expected)
        with pytest.raises(SlotNotResident):
            made.weights("unknown")


def test_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots"), residency(slots=0):
        pass


def test_small_versions_pass_large_ones_that_are_read() -> None:
    with residency() as (made, disk):
        large, may_end = {f"large{number}" for number in range(LOADS + 1)}, threading.Event()
        running: set[str] = set()

        def slow(version: str, weights: Any) -> Any:
            if version in large:
                running.add(version)
                assert may_end.wait(TIMEOUT_S)
            return weights

        disk.changed = slow
        disk.sizes = dict.fromkeys(large, LARGE_BYTES)
        for version in sorted(large):
            made.prefetch(version)
        fetch(made, "small", "more")
        assert [made.state(version) for version in ("small", "more")] == ["ready", "ready"]
        until(lambda: len(running) >= LOADS - 1, "not at once")
        fetch(made, "another")
        assert len(running) == LOADS - 1, "not bounded"
        may_end.set()
        until(lambda: all(made.state(version) in ("ready", "absent") for version in large))


def test_small_versions_pass_one_without_room_for_a_bounded_time() -> None:
    clock = FakeClock()
    with residency(slots=4, device_bytes=4 * ONE, clock=clock) as (made, disk):
        disk.ranks["big"] = 6  # three of four units
        fetch(made, "a", "b")
        made.lease(["a", "b"])
        read_in(made, disk, "big")
        fetch(made, "c")
        assert (made.state("big"), made.state("c")) == ("loading", "ready")
        clock.advance(PASS_S)
        read_in(made, disk, "d")
        assert made.state("d") == "loading"
        made.release(["a", "b"])
        until(lambda: made.state("big") == "ready")
        until(lambda: made.state("d") == "ready")


Step = tuple[str, int]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(
        st.tuples(st.sampled_from(["fetch", "lease", "release", "pin", "drop"]), st.integers(0, 6)),
        max_size=40,
    ),
)
def test_budgets_hold_and_nothing_in_use_or_pinned_leaves(
    slots: int, device_units: int, steps: list[Step]
) -> None:
    device_bytes, host_bytes = device_units * ONE, 3 * ONE
    with residency(slots=slots, device_bytes=device_bytes, host_bytes=host_bytes) as (made, disk):
        held: list[tuple[str, int]] = []
        for action, number in steps:
            version = f"v{number}"
            if action == "fetch":
                made.prefetch(version)
            elif action == "lease" and made.state(version) == "ready":
                # It may leave between the two calls, for another that waited.
                with suppress(SlotNotResident):
                    held.append((version, made.lease([version])[version]))
            elif action == "release" and held:
                made.release([held.pop(number % len(held))[0]])
            elif action == "pin":
                made.set_pinned([version] if number else [])
            elif action == "drop":
                made.drop(version)
            snapshot = made.snapshot()
            assert snapshot.device_bytes <= device_bytes
            assert snapshot.slots_used <= slots
            for name, slot in held:
                assert snapshot.tiers[name] == "device"
                assert slot in disk.adapted.layers["0"].slots
            _check_slots_hold_their_versions(made, disk, dict(held))
        for name, _ in held:
            made.release([name])


def _check_slots_hold_their_versions(made: Residency, disk: Disk, held: Mapping[str, int]) -> None:
    slots = disk.adapted.layers["0"].slots
    for version, slot in held.items():
        expected = weights_of(version, disk.adapted).factors["0"].a
        assert torch.equal(slots[slot].a, expected), version
