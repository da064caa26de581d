"""Which versions may be let go of, and when it is worth looking."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.engine.snapshot import NamedVersions


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def _later(clock: list[float], seconds: float = 1.5) -> None:
    clock[0] += seconds


def test_nothing_is_looked_for_while_nothing_can_have_lost_its_name(clock: list[float]) -> None:
    names = NamedVersions()
    assert not names.is_due()
    names.named = frozenset("ab")
    _later(clock)
    assert names.is_due()
    assert names.unnamed({"a", "b"}) == set()
    names.ask("a")
    _later(clock, 1000.0)
    assert not names.is_due()
    names.named = frozenset("b")
    assert names.is_due()
    assert names.unnamed({"a", "b"}) == {"a"}
    _later(clock)
    assert not names.is_due()


@pytest.mark.parametrize("why", ["asked", "needed"])
def test_what_is_held_without_a_name_is_looked_at_until_it_goes(
    clock: list[float], why: str
) -> None:
    names = NamedVersions(spare_s=5.0)
    names.named = frozenset("a")
    _later(clock)
    assert names.unnamed({"a"}) == set()
    if why == "asked":
        names.ask("x")  # before the worker hears of its name
    more: dict[str, Any] = {"needed": {"x"}} if why == "needed" else {}
    if why == "needed":
        names.named = frozenset("a")
    for _ in range(2):
        _later(clock)
        assert names.is_due()
        assert names.unnamed({"a", "x"}, **more) == set()
    _later(clock, 6.0)
    assert names.is_due()
    assert names.unnamed({"a", "x"}) == {"x"}
    _later(clock)
    assert not names.is_due()


def test_what_is_asked_for_and_not_held_yet_is_not_forgotten(clock: list[float]) -> None:
    names = NamedVersions(spare_s=5.0)
    names.named = frozenset("a")
    names.ask("x")
    _later(clock)
    assert names.unnamed({"a"}) == set()
    _later(clock, 6.0)
    assert names.is_due(), "it may have come since"
    assert names.unnamed({"a", "x"}) == {"x"}
