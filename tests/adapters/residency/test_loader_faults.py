"""What the loader's thread survives, and whom it keeps waiting: nobody, whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from adapters.residency.packing import PackedAdapter
from adapters.residency.slots import Residency
from adapters.residency.tiers import Tiers
from tests.stand.residencies import fetch, residency
from tests.stand.waits import TIMEOUT_S, until


def _broken(*_: object, **__: object) -> Any:
    raise RuntimeError("broken on purpose")


def _serves(made: Residency, *versions: str) -> None:
    for version in versions:
        fetch(made, version)
        assert made.state(version) == "ready", made.error(version)


def test_a_compact_adapter_that_cannot_be_made_whole_fails_alone() -> None:
    with residency(slots=1) as (made, disk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedAdapter, "is_compact", property(lambda self: self.weights is spoiled))
        patch.setattr(PackedAdapter, "restore", _broken)
        spoiled: object = None
        _serves(made, "a", "b")
        spoiled = made.weights("a")
        fetch(made, "a")
        assert made.state("a") == "failed"
        assert "on purpose" in str(made.error("a"))
        _serves(made, "b", "c", "a")
        assert disk.reads == ["a", "b", "c", "a"]


def test_an_adapter_that_cannot_be_made_compact_stays_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []

    def compact(packed: PackedAdapter) -> None:
        tried.append(id(packed))
        _broken()

    with residency(slots=1) as (made, disk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedAdapter, "compact", compact)
        disk.changed = lambda _, weights: replace(weights, sparsity=0.9)
        _serves(made, "a", "b")
        until(lambda: len(tried) == 1)
        _serves(made, "a", "b")
        assert len(set(tried)) == len(tried), "one was tried again"
        assert "without its zeros" in caplog.text
        assert disk.reads == ["a", "b"]


@pytest.mark.parametrize("step", ["copy", "empty", "install", "room", "zeros"])
def test_a_fault_while_slots_are_filled_leaves_nobody_loading(step: str) -> None:
    with residency(slots=1) as (made, disk):
        heard: list[str] = []
        made.on_ready(heard.append)
        _serves(made, "before")
        with pytest.MonkeyPatch.context() as patch:
            if step == "copy":

                @contextmanager
                def copying() -> Iterator[None]:
                    yield
                    _broken()

                patch.setattr(made, "_copying", copying)
            elif step == "empty":
                patch.setattr(Tiers, "empty", _broken)
            elif step == "install":
                patch.setattr(disk.adapted, "install", _broken)
            elif step == "room":
                patch.setattr(Tiers, "make_room", _broken)
            else:
                patch.setattr(Tiers, "to_compact", _broken)
            fetch(made, "a")
            assert made.state("a") == "failed"
            assert "on purpose" in str(made.error("a"))
        assert made.snapshot().failures == 1
        assert made.snapshot().slots_used == (0 if step in ("copy", "empty", "install") else 1)
        _serves(made, "a", "b", "before")
        until(lambda: heard == ["before", "a", "a", "b", "before"])


@contextmanager
def _slow_install(adapted: Any) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Slots are filled only once the second event is set; the first says that one begins."""
    begun, may_end = threading.Event(), threading.Event()
    real = adapted.install

    def install(*args: Any, **options: Any) -> None:
        begun.set()
        assert may_end.wait(TIMEOUT_S)
        real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "install", install)
        try:
            yield begun, may_end
        finally:
            may_end.set()


def test_nobody_waits_for_a_slot_that_is_being_filled() -> None:
    with residency(slots=2) as (made, disk):
        _serves(made, "warm")
        with _slow_install(disk.adapted) as (begun, may_end):
            made.prefetch("cold")
            assert begun.wait(TIMEOUT_S)
            done = threading.Event()

            def others() -> None:
                made.release(made.lease(["warm"]))
                made.prefetch("more")
                assert made.state("cold") == "loading"
                assert made.snapshot().slots_used == 2
                assert made.hold(["cold"]) == {}
                done.set()

            threading.Thread(target=others, daemon=True).start()
            assert done.wait(TIMEOUT_S / 2), "the lock is held while a slot is filled"
            may_end.set()
            until(lambda: made.state("cold") == "ready")


@pytest.mark.parametrize("again", [False, True])
def test_what_is_dropped_while_its_slot_is_filled_leaves_it(again: bool) -> None:
    with residency(slots=1) as (made, disk):
        with _slow_install(disk.adapted) as (begun, may_end):
            made.prefetch("a")
            assert begun.wait(TIMEOUT_S)
            made.drop("a")
            if again:
                made.prefetch("a")
            may_end.set()
            until(lambda: made.state("a") == ("ready" if again else "absent"))
        slots = disk.adapted.layers["0"].slots
        assert len(slots) == made.snapshot().slots_used == int(again)
        _serves(made, "b")
        assert len(slots) == 1
