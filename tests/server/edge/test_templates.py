"""Conversations take turns by template: a slow one holds up its own users and nobody else."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from adapters.intake.conversation import Conversation
from server.edge.admit.bounded_pool import PoolFull, PoolLate
from server.edge.templates import KEPT_BYTES, PROCESSES, Templates
from server.inputs.rendering import ChatTemplate, ChatTemplateFailed, RenderLimits

SLOW = ChatTemplate("{% for a in range(30000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}")
QUICK = ChatTemplate("{{ messages[0].content }}")
MESSAGES = [{"role": "user", "content": "hi"}]


def nothing(version: str) -> Conversation:
    raise AssertionError(version)


async def ask(templates: Templates, key: str, template: ChatTemplate, **more: Any) -> str:
    given = {"deadline": time.monotonic() + 60.0, "most": 64, **more}
    return await templates.render(key, template, MESSAGES, 10, **given)


def test_slow_templates_of_one_adapter_leave_the_other_places_free() -> None:
    async def run() -> None:
        templates = Templates(RenderLimits(cpu_s=0.3), nothing)
        slow = [asyncio.ensure_future(ask(templates, "slow", SLOW)) for _ in range(2 * PROCESSES)]
        await asyncio.sleep(0)
        for number in range(8):
            assert await ask(templates, f"other{number}", QUICK) == "hi"
        assert not all(one.done() for one in slow)  # they take turns, one at a time
        found = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(one, ChatTemplateFailed) for one in found)
        assert templates.waiting == 0
        templates.close()

    asyncio.run(run())


def test_who_cannot_be_answered_in_time_is_told_and_its_turn_goes_on() -> None:
    async def run() -> None:
        templates = Templates(RenderLimits(cpu_s=0.3), nothing)
        with pytest.raises(PoolLate):
            await ask(templates, "a", QUICK, deadline=time.monotonic() - 1)
        with pytest.raises(PoolFull):
            await ask(templates, "a", QUICK, most=0)
        first = asyncio.ensure_future(ask(templates, "a", SLOW))
        left = asyncio.ensure_future(ask(templates, "a", SLOW))
        await asyncio.sleep(0.01)
        left.cancel()
        first.cancel()
        await asyncio.gather(first, left, return_exceptions=True)
        assert await ask(templates, "a", QUICK) == "hi"
        assert templates.waiting == 0
        templates.close()

    asyncio.run(run())


def test_what_was_read_from_the_store_is_kept_within_bounds() -> None:
    read: list[str] = []
    size = KEPT_BYTES // 4

    def load(version: str) -> Conversation:
        read.append(version)
        return Conversation(templates={"default": "x" * size})

    async def run() -> None:
        templates = Templates(RenderLimits(), load)
        for version in ("a", "b", "a", "c", "a", "d", "a", "e", "b"):
            assert (await templates.conversation(version)).templates
        templates.close()

    asyncio.run(run())
    assert read == ["a", "b", "c", "d", "e", "b"]
