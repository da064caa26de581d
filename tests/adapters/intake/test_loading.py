"""How adapters come: many at once in one copy, by a thread that gives way, headers parsed once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import BaseMismatch, CorruptFile, NonFinite
from adapters.intake.checkpoint import load_adapter
from adapters.intake.recent_results import RecentResults
from adapters.intake.safetensors_header import inspect_values
from adapters.residency.low_priority import step_back
from adapters.residency.slots import Residency
from adapters.signature import describe
from tests.stand.folders import hira_folder
from tests.stand.residencies import fetch, residency
from tests.stand.tiny_models import build
from tests.stand.waits import until


def passes_of(made: Residency, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The versions that each copy to the device brings, from now on."""
    passes: list[list[str]] = []
    copying, arrive = made._copying, made._tiers.arrive

    @contextmanager
    def counted() -> Iterator[None]:
        passes.append([])
        with copying():
            yield

    def noted(version: str, grace_s: float) -> list[str]:
        passes[-1].append(version)
        return arrive(version, grace_s)

    monkeypatch.setattr(made, "_copying", counted)
    monkeypatch.setattr(made._tiers, "arrive", noted)
    return passes


def test_versions_that_wait_together_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with residency(slots=3) as (made, disk):
        fetch(made, "a", "b", "c")
        made.lease(["a", "b", "c"])
        for version in "def":
            made.prefetch(version)
        until(lambda: len(disk.reads) == 6)
        until(lambda: made.snapshot().loads == 6)
        passes = passes_of(made, monkeypatch)
        made.release(["a", "b", "c"])
        until(lambda: all(made.state(version) == "ready" for version in "def"))
        assert [one for one in passes if one] == [["d", "e", "f"]]
        assert made.snapshot().slots_used == 3


def test_one_that_cannot_be_installed_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with residency(slots=3) as (made, disk):
        fetch(made, "a", "b", "c")
        made.lease(["a", "b", "c"])
        for version in "def":
            made.prefetch(version)
        until(lambda: made.snapshot().loads == 6)
        install, asked = disk.adapted.install, []

        def failing(slot: int, factors: Any, **options: Any) -> None:
            asked.append(slot)
            if len(asked) == 2:
                raise torch.OutOfMemoryError
            install(slot, factors, **options)

        monkeypatch.setattr(disk.adapted, "install", failing)
        made.release(["a", "b", "c"])
        until(lambda: all(made.state(version) != "loading" for version in "def"))
        assert [made.state(version) for version in "def"] == ["ready", "failed", "ready"]
        snapshot = made.snapshot()
        assert snapshot.slots_used == 2
        assert len(set(made.lease(["d", "f"]).values())) == 2
        fetch(made, "e")
        assert made.state("e") == "ready"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own here")
def test_stepping_back_changes_the_calling_thread_alone() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: dict[str, Any] = {}

    def quiet() -> None:
        assert step_back()
        found["quiet"] = (priority(), torch.get_num_threads())

    def other() -> None:
        found["other"] = (priority(), torch.get_num_threads())

    before = (priority(), torch.get_num_threads())
    for work in (quiet, other):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found["quiet"] == (min(19, before[0] + 10), 1)
    assert found["other"] == before == (priority(), torch.get_num_threads())


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4))
def test_recent_keeps_the_keys_used_last(keys: list[int], capacity: int) -> None:
    recent: RecentResults[int] = RecentResults(capacity)
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return key * 10

    for place, key in enumerate(keys):
        before = len(made)
        assert recent.get(key, lambda key=key: make(key)) == key * 10  # type: ignore[misc]
        last = list(dict.fromkeys(reversed(keys[:place])))[:capacity]
        assert (len(made) == before) == (key in last)


def test_what_raises_is_not_kept() -> None:
    recent: RecentResults[int] = RecentResults(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 3) == 3


def test_a_plan_is_used_again_for_its_own_base_alone(tmp_path: Path) -> None:
    base = describe(build("distilbert"), "distilbert")
    folder = hira_folder(tmp_path / "adapter")
    first = load_adapter(folder, base)
    with pytest.raises(BaseMismatch):
        load_adapter(folder, describe(build("llama"), "llama"))
    again = load_adapter(folder, base)
    assert again.factors.keys() == first.factors.keys()
    for path, entry in again.factors.items():
        assert torch.equal(entry.a, first.factors[path].a)
        assert entry.a.data_ptr() != first.factors[path].a.data_ptr()


def test_a_file_cut_short_after_a_good_one_of_its_header_is_refused(tmp_path: Path) -> None:
    base = describe(build("distilbert"), "distilbert")
    folder = hira_folder(tmp_path / "adapter")
    load_adapter(folder, base)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptFile):
        load_adapter(folder, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_counted(dtype: torch.dtype, spoiled: float) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[0, 0] = 0
    assert (inspect_values(tensor, "a").nonzero, inspect_values(tensor, "a").fault) == (14, None)
    tensor[1, 2], tensor[2, 2] = spoiled, -spoiled
    fault = inspect_values(tensor, "a").fault
    assert isinstance(fault, NonFinite)
    assert fault.found == "2 of 15 values"


def test_finite_values_whose_sum_is_not_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert inspect_values(torch.full((8,), largest), "a").fault is None
