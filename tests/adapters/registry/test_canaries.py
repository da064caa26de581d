"""A version that gets a share of a name's requests, on both databases."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import (
    AdapterNotFound,
    AlreadyCurrent,
    BaseMismatch,
    CanaryNotFound,
    InvalidShare,
    OtherTask,
    VersionGone,
    VersionNotFound,
)
from adapters.registry.names import Names
from adapters.registry.records import AdapterRecord, WantedName
from adapters.registry.registry import Registry
from adapters.signature import BaseSignature
from tests.stand.registries import base, folders, made_in, url

__all__ = ["base", "folders", "url"]  # the fixtures


@pytest.fixture
def registry(tmp_path: Path, url: str | None, base: BaseSignature, folders: list[Path]) -> Registry:
    """With an adapter a that was on one version before."""
    made = made_in(tmp_path, url, kept_versions=1)
    for folder in folders[:2]:
        made.register("a", folder, base, source=folder.name, replace=True)
    return made


def start(
    registry: Registry, base: BaseSignature, version: str | None, share: float
) -> AdapterRecord:
    return registry.moves.start_canary("a", version, share, lambda one: registry.staged(one, base))


def share_of(registry: Registry) -> tuple[str, float] | None:
    canary = Registry(registry.url, registry.store).resolve("a").canary
    return None if canary is None else (canary.record.version, canary.share)


def share_of_any(registry: Registry) -> tuple[str, float] | None:
    found = Registry(registry.url, registry.store).records().get("a")
    return None if found is None or found.canary is None else share_of(registry)


def test_a_staged_version_gets_a_share_and_takes_the_name(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    registry.update("a", pinned=True)
    current = registry.resolve("a").version
    staged = registry.stage(folders[2], base).version
    record = start(registry, base, staged, 10)
    assert registry.resolve("a") == record
    assert (record.version, share_of(registry)) == (current, (staged, 10.0))
    names = Names(registry, lambda: 0)
    names.refresh()
    assert names.versions() == registry.versions() == {current, staged}
    assert names.pinned_versions() == registry.pinned_versions() == (current, staged)
    assert registry.collect_garbage(grace_s=0) == []
    begun = record.canary.record.created if record.canary else None
    again = start(registry, base, None, 50)
    assert share_of(registry) == (staged, 50.0)
    assert again.canary is not None
    assert again.canary.record.created == begun
    now, before = registry.moves.promote("a")
    assert (now.version, before.version, now.canary, now.pinned) == (staged, current, None, True)
    assert registry.resolve("a") == now
    newest = registry.moves.history("a")[0]
    assert (newest.act, newest.version) == ("promoted", staged)


def test_an_aborted_canary_leaves_the_name_where_it_is(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    before = registry.resolve("a")
    staged = registry.stage(folders[2], base).version
    start(registry, base, staged, 100)
    record, left = registry.moves.abort("a")
    assert (record, left) == (before, staged)
    assert len(registry.moves.history("a")) == 2
    assert registry.collect_garbage(grace_s=0) == [staged]
    for ended in (registry.moves.abort, registry.moves.promote):
        with pytest.raises(CanaryNotFound):
            ended("a")
        with pytest.raises(AdapterNotFound):
            ended("nobody")


def test_an_old_version_may_be_tried_again_by_its_first_digits(
    registry: Registry, base: BaseSignature
) -> None:
    old = registry.moves.history("a")[1].version
    record = start(registry, base, old[:8], 0)
    assert record.canary is not None
    assert (record.canary.record.version, record.canary.record.source) == (old, "0")


@pytest.mark.parametrize("share", [100.001, 101.0, -0.001, float("nan"), float("inf")])
def test_a_share_beyond_the_whole_is_refused(
    registry: Registry, base: BaseSignature, share: float
) -> None:
    old = registry.moves.history("a")[1].version
    with pytest.raises(InvalidShare):
        start(registry, base, old, share)
    assert share_of(registry) is None


def test_what_cannot_be_a_canary_is_refused(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    newest, oldest = registry.moves.history("a")
    with pytest.raises(AlreadyCurrent):
        start(registry, base, newest.version, 10)
    with pytest.raises(VersionNotFound):
        start(registry, base, "f" * 32, 10)
    with pytest.raises(CanaryNotFound):
        start(registry, base, None, 10)
    with pytest.raises(OtherTask) as caught:
        registry.moves.start_canary(
            "a",
            oldest.version,
            10,
            lambda one: replace(registry.staged(one, base), task="fill-mask"),
        )
    assert caught.value.found == "fill-mask"
    shutil.rmtree(registry.store.path(oldest.version))
    with pytest.raises(VersionGone):
        start(registry, base, oldest.version, 10)
    assert share_of(registry) is None


@pytest.mark.parametrize("way", ["rollback", "replace by it", "replace by another", "remove"])
def test_a_canary_ends_where_it_makes_no_sense_any_more(
    registry: Registry, base: BaseSignature, folders: list[Path], way: str
) -> None:
    staged = registry.stage(folders[2], base).version
    start(registry, base, staged, 10)
    match way:
        case "rollback":
            registry.moves.rollback("a", None, lambda one: registry.staged(one, base))
        case "remove":
            registry.remove("a")
            registry.register("a", folders[1], base, source="x")
        case _:
            folder = folders[2 if way.endswith("by it") else 3]
            registry.register("a", folder, base, source="x", replace=True)
    assert share_of(registry) == ((staged, 10.0) if way.endswith("another") else None)


@pytest.mark.parametrize("way", ["remove", "another task", "apply a removal"])
def test_bytes_that_a_canary_answered_with_stay_for_requests_under_way(
    registry: Registry, base: BaseSignature, folders: list[Path], way: str
) -> None:
    staged = registry.stage(folders[2], base)
    start(registry, base, staged.version, 10)
    long_ago = staged.created.timestamp() - 3600
    os.utime(registry.store.path(staged.version), (long_ago, long_ago))
    match way:
        case "remove":
            registry.remove("a")
        case "apply a removal":
            registry.apply([], ["a"])
        case _:
            other = replace(registry.stage(folders[3], base), task="fill-mask")
            registry.apply([WantedName("a", other, "x")])
    assert share_of_any(registry) is None
    assert registry.collect_garbage(grace_s=600) == []
    assert registry.store.has(staged.version)


def test_a_canary_without_bytes_is_told_at_the_start(
    registry: Registry,
    base: BaseSignature,
    folders: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    staged = registry.stage(folders[2], base).version
    start(registry, base, staged, 10)
    assert registry.check() == []
    assert caplog.messages == []
    shutil.rmtree(registry.store.path(staged))
    assert registry.check() == ["a"]
    (told,) = caplog.messages
    assert f"canary of a, version {staged}, are missing" in told


def test_a_canary_of_another_base_is_not_promoted(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    staged = registry.stage(folders[2], base).version
    other = replace(base, digest="other")
    registry.moves.start_canary("a", staged, 10, lambda one: registry.staged(one, other))
    with pytest.raises(BaseMismatch):
        registry.moves.promote("a")
    assert share_of(registry) == (staged, 10.0)
