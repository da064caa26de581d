"""Grammars that are checked for requests: once each, and remembered without what asked for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from server.edge.grammars import Grammars
from server.inputs.grammars import GrammarLimits, GrammarProcess, GrammarRefused
from server.inputs.text_errors import InputTooSlow
from server.messages import Grammar


class Checks:
    """Stands for the processes that check: counts, waits until it may go on, refuses on demand."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go_on = threading.Event()

    def __call__(self, kind: str, content: Any, **more: Any) -> Grammar:
        self.asked.append(content)
        self.go_on.wait(10)
        if content == "refused":
            raise GrammarRefused("It cannot be kept.", found="refused")
        return Grammar(content, content)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    made = Checks()
    monkeypatch.setattr(GrammarProcess, "check", made)
    yield made
    made.go_on.set()


def grammars() -> Grammars:
    return Grammars(lambda: (), GrammarLimits(), hang_s=60, hung=lambda name: None)


async def ask(checked: Grammars, content: str, within_s: float = 10.0) -> Grammar:
    return await checked.check("regex", content, deadline=time.monotonic() + within_s, most=100)


def frames(error: BaseException) -> int:
    count, at = 0, error.__traceback__
    while at is not None:
        count, at = count + 1, at.tb_next
    return count


def test_a_refusal_that_is_remembered_keeps_nothing_of_those_it_was_told(checks: Checks) -> None:
    async def run() -> list[int]:
        checked, found = grammars(), []
        checks.go_on.set()
        for _ in range(5):
            with pytest.raises(GrammarRefused) as refused:
                await ask(checked, "refused")
            assert refused.value.found == "refused"
            found.append(frames(refused.value))
        checked.close()
        return found

    lengths = asyncio.run(run())
    assert lengths == [lengths[0]] * 5
    assert len(checks.asked) == 1


def test_one_grammar_of_many_requests_at_once_is_checked_once(checks: Checks) -> None:
    async def run() -> list[Grammar]:
        checked = grammars()
        asked = [asyncio.ensure_future(ask(checked, one)) for one in ["a", "b", "a"] * 5]
        await asyncio.sleep(0)
        checks.go_on.set()
        found = await asyncio.gather(*asked)
        checked.close()
        return list(found)

    assert [one.text for one in asyncio.run(run())] == ["a", "b", "a"] * 5
    assert sorted(checks.asked) == ["a", "b"]


def test_who_waits_for_another_requests_check_has_a_deadline_and_takes_over(
    checks: Checks,
) -> None:
    async def run() -> Grammar:
        checked = grammars()
        first = asyncio.ensure_future(ask(checked, "a"))
        await asyncio.sleep(0)
        with pytest.raises(InputTooSlow):
            await ask(checked, "a", 0.02)
        other = asyncio.ensure_future(ask(checked, "a"))
        await asyncio.sleep(0)
        first.cancel()  # its client left
        await asyncio.wait({first})
        checks.go_on.set()
        found = await other
        checked.close()
        return found

    assert asyncio.run(run()).text == "a"
