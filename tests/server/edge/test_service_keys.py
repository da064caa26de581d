"""What a service makes of keys: a default that is not for a key, and a keys file that is new."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


GOOD = f'[ops]\nsha256 = "{digest_of(b"new")}"\nadmin = true\n'
OTHER = f'[late]\nsha256 = "{digest_of(b"late")}"\nadmin = true\n'
BROKEN = "[ops\n"
UNMANNED = f'[app]\nsha256 = "{digest_of(b"new")}"\n'  # nobody could make the admin calls


def follow_until(service: Service, holds: Callable[[], bool]) -> None:
    async def follow() -> None:
        following = asyncio.create_task(service.follow_keys())
        while not holds():
            await asyncio.sleep(0.05)
        following.cancel()

    asyncio.run(asyncio.wait_for(follow(), 30))


def is_open(service: Service) -> bool:
    try:
        return service.keys.admit_inference(None) is None
    except Refusal:
        return False


@pytest.mark.parametrize("content", [BROKEN, UNMANNED, None])
def test_an_open_server_that_is_given_a_broken_keys_file_is_closed_until_it_is_right(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys.toml"
    if content is not None:
        file.write_text(content)
    now = [load_settings({"data_dir": tmp_path, "admin_key": "the-admin-key-of-before"})]
    if content == UNMANNED:
        now = [load_settings({"data_dir": tmp_path})]
    service = service_of(now)
    admin = service.keys.named()[0]
    key = "Bearer the-admin-key-of-before"
    if content == UNMANNED:
        key = f"Bearer {(tmp_path / 'admin.key').read_text().strip()}"
    assert is_open(service)
    service.keys.admit_metrics(None)
    now.append(now[0].model_copy(update={"keys_file": file}))
    service.load.settings_changed()
    follow_until(service, lambda: service.keys_fault is not None)
    assert not is_open(service)
    assert service.keys.admit_admin(key) == admin
    service.keys.admit_metrics(key)
    for wrong in ("Bearer new", None):
        with pytest.raises(Refusal):
            service.keys.admit_metrics(wrong)
    file.write_text(GOOD)
    follow_until(service, lambda: service.keys_fault is None)
    assert service.keys.admit_admin("Bearer new").name == "ops"
    assert not is_open(service)
    now.append(now[0])
    service.load.settings_changed()
    service.refresh()
    assert is_open(service)
    service.keys.admit_metrics(None)


def test_a_closed_server_keeps_the_last_good_keys_while_the_file_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(GOOD)
    settings = load_settings(
        {"data_dir": tmp_path, "keys_file": file, "api_keys": {"app": "old-key-1"}}
    )
    service = service_of([settings])
    for content in (BROKEN, UNMANNED):
        file.write_text(content)
        follow_until(service, lambda: service.keys_fault is not None)
        assert service.keys.admit_admin("Bearer new").name == "ops"
        assert service.keys.admit_inference("Bearer old-key-1") == ApiKey("app")
        assert not is_open(service)
        file.write_text(GOOD)
        follow_until(service, lambda: service.keys_fault is None)


@pytest.mark.parametrize("content", [BROKEN, UNMANNED])
@pytest.mark.parametrize("changed", [False, True])
def test_a_process_that_begins_while_the_file_is_broken_takes_no_key_that_may_be_gone(
    tmp_path: Path, changed: bool, content: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(GOOD)
    settings = load_settings(
        {"data_dir": tmp_path, "keys_file": file, "api_keys": {"app": "old-key-1"}}
    )
    service = service_of([settings])  # as the main process has it, which makes all others
    if changed:
        service.load.keys_changed(0)  # by a process that has died
    file.write_text(content)
    service.look_at_keys()
    assert service.keys_fault is not None
    assert not is_open(service)
    assert service.keys.admit_inference("Bearer old-key-1") == ApiKey("app")
    if changed:
        with pytest.raises(Refusal, match="not an admin key"):
            service.keys.admit_admin("Bearer new")
        assert not (tmp_path / "admin.key").exists()
    else:
        assert service.keys.admit_admin("Bearer new").name == "ops"
    file.write_text(OTHER)
    service.look_at_keys()
    assert not service.keys_fault
    assert service.keys.admit_admin("Bearer late").name == "late"
    assert service.load.keys_were_changed()


@pytest.mark.parametrize("content", [BROKEN, UNMANNED])
def test_keys_of_the_settings_are_changed_while_no_file_was_ever_read(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(GOOD)
    options = {"data_dir": tmp_path, "keys_file": file, "api_keys": {"app": "old-key-1"}}
    now = [load_settings(options | {"admin_key": "the-admin-key-of-before"})]
    service = service_of(now)
    service.load.keys_changed(0)
    file.write_text(content)
    service.look_at_keys()  # of a process that begins: what the file had is not known to it
    assert service.keys.admit_admin("Bearer the-admin-key-of-before").admin
    now.append(load_settings(options | {"admin_key": "the-admin-key-after-it"}))
    service.load.settings_changed()
    service.refresh()
    assert service.keys_fault is not None
    assert service.keys.admit_admin("Bearer the-admin-key-after-it").admin
    with pytest.raises(Refusal, match="not an admin key"):
        service.keys.admit_admin("Bearer the-admin-key-of-before")


def test_a_broken_file_stays_broken_when_settings_are_reloaded(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(GOOD)
    service = service_of([load_settings({"data_dir": tmp_path, "keys_file": file})])
    file.write_text(BROKEN)
    follow_until(service, lambda: service.keys_fault is not None)
    service.load.settings_changed()
    service.refresh()
    assert service.keys_fault is not None
    assert service.keys.admit_admin("Bearer new").name == "ops"


def test_generated_admin_key_stays_while_a_new_file_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(BROKEN)
    now = [load_settings({"data_dir": tmp_path})]
    service = service_of(now)
    key = f"Bearer {(tmp_path / 'admin.key').read_text().strip()}"
    now.append(now[0].model_copy(update={"keys_file": file}))
    service.load.settings_changed()
    follow_until(service, lambda: service.keys_fault is not None)
    service.load.settings_changed()
    service.refresh()
    assert service.keys.admit_admin(key).admin
    assert not is_open(service)
