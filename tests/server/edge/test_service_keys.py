"""What a service makes of keys: a default that is not for a key, and a keys file that is new."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.edge.admit.callers import Caller, set_caller
from server.edge.admit.key_file import ApiKey, digest_of
from server.edge.service import Service
from server.edge.target import Base
from server.errors import Refusal
from server.settings import Settings, load_settings
from tests.stand.fake_server import FakeRegistry


def service_of(now: list[Settings]) -> Service:
    nothing: Any = None
    signature: Any = SimpleNamespace(digest="")
    base = Base("mine", "text-generation", signature, nothing, nothing, nothing, 0.0)
    registry: Any = FakeRegistry()
    return Service(now[-1], base, registry, lambda: now[-1])


def test_a_default_that_is_not_for_a_key_is_none(tmp_path: Path) -> None:
    service = service_of([load_settings({"data_dir": tmp_path, "default_adapter": "story"})])
    try:
        for patterns, expected in ((("story",), "story"), (("imdb", "base"), "mine")):
            set_caller(Caller("id", ApiKey("app", adapters=patterns)))
            assert service.default_model == expected
        set_caller(Caller("id"))
        assert service.default_model == "story"
    finally:
        set_caller(None)


def test_a_new_keys_file_holds_once_it_is_read_and_until_then_the_keys_of_before(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[ops]\nsha256 = "{digest_of(b"new")}"\nadmin = true\n')
    plain: dict[str, Any] = {"data_dir": tmp_path, "api_keys": {"app": "old-key-1"}}
    now = [load_settings(plain)]
    service = service_of(now)
    now.append(load_settings({**plain, "keys_file": file}))
    service.load.settings_changed()
    service.refresh()
    assert service.keys_fault is None
    assert service.keys.admit_inference("Bearer old-key-1") == ApiKey("app")
    with pytest.raises(Refusal):
        service.keys.admit_inference("Bearer new")

    async def follow() -> None:
        following = asyncio.create_task(service.follow_keys())
        while len(service.keys.named()) < 2 or not service.keys.named()[1].admin:
            await asyncio.sleep(0.05)
        following.cancel()

    asyncio.run(asyncio.wait_for(follow(), 30))
    found = service.keys.admit_admin("Bearer new")
    assert (found.name, service.keys_fault) == ("ops", None)
