"""Other names for adapters, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.errors import (
    AdapterAliased,
    AdapterError,
    AdapterExists,
    AdapterFaults,
    AdapterNotFound,
    AliasOfAlias,
    AliasToItself,
    InvalidName,
)
from adapters.registry.names import Names
from adapters.registry.records import WantedName
from adapters.registry.registry import Registry
from adapters.registry.tables import ALIASES, CANARIES, STATE
from adapters.signature import BaseSignature
from tests.stand.registries import base, folders, made_in, url

__all__ = ["base", "folders", "url"]  # the fixtures


@pytest.fixture
def registry(tmp_path: Path, url: str | None, base: BaseSignature, folders: list[Path]) -> Registry:
    """With two adapters, a and b."""
    made = made_in(tmp_path, url)
    for name in "ab":
        made.register(name, folders[0], base, source="x")
    return made


def test_an_alias_is_resolved_moved_and_removed(registry: Registry) -> None:
    names = Names(registry, lambda: 0)
    record, before = registry.aliases.set("prod", "a")
    assert (record.name, record.aliases, before) == ("a", ("prod",), None)
    assert names.refresh()
    assert names.resolve("prod").name == "a"
    assert names.resolve("a").aliases == ("prod",)
    assert names.knows("prod")
    assert [one.name for one in names.listed()] == ["a", "b"]
    generation = registry.generation()
    assert registry.aliases.set("prod", "a")[1] == "a"
    assert registry.generation() == generation
    assert registry.aliases.set("prod", "b")[1] == "a"
    registry.aliases.set("also", "b")
    assert registry.aliases.all() == {"also": "b", "prod": "b"}
    names.refresh()
    assert names.resolve("prod").name == "b"
    assert (names.resolve("a").aliases, names.resolve("b").aliases) == ((), ("also", "prod"))
    assert registry.aliases.remove("prod") == "b"
    names.refresh()
    with pytest.raises(AdapterNotFound):
        names.resolve("prod")
    assert Registry(registry.url, registry.store).list() == registry.list()


@pytest.mark.parametrize(
    ("alias", "name", "error"),
    [
        ("a", "a", AliasToItself),
        ("prod", "prod", AliasToItself),
        ("more", "prod", AliasOfAlias),
        ("b", "a", AdapterExists),
        ("more", "nobody", AdapterNotFound),
        ("More", "a", InvalidName),
        ("more", "\0", AdapterNotFound),
        ("more", "\ud800", AdapterNotFound),
    ],
)
def test_what_is_no_alias_is_refused_and_changes_nothing(
    registry: Registry, alias: str, name: str, error: type[AdapterError]
) -> None:
    registry.aliases.set("prod", "a")
    before = registry.generation(), registry.aliases.all()
    with pytest.raises(error):
        registry.aliases.set(alias, name)
    assert (registry.generation(), registry.aliases.all()) == before


def test_no_adapter_takes_the_name_of_an_alias_and_no_target_goes(
    registry: Registry, base: BaseSignature, folders: list[Path]
) -> None:
    registry.aliases.set("prod", "a")
    for replace in (False, True):
        with pytest.raises(AdapterExists, match="alias of a"):
            registry.register("prod", folders[0], base, source="x", replace=replace)
    wanted = WantedName("prod", registry.resolve("a"), "x")
    for dry_run in (False, True):
        with pytest.raises(AdapterFaults, match="is the name of an adapter"):
            registry.apply([wanted], dry_run=dry_run)
        with pytest.raises(AdapterFaults, match="Aliases point to a"):
            registry.apply([], ["b", "a"], dry_run=dry_run)
    with pytest.raises(AdapterAliased) as caught:
        registry.remove("a")
    assert caught.value.found == "prod"
    assert registry.resolve("a").aliases == ("prod",)
    assert registry.resolve("b").name == "b"
    registry.aliases.remove("prod")
    registry.remove("a")
    with pytest.raises(AdapterNotFound):
        registry.aliases.remove("prod")


def test_aliases_are_applied_with_the_names_or_not_at_all(registry: Registry) -> None:
    registry.aliases.set("old", "a")
    registry.aliases.set("prod", "a")
    wanted = [WantedName("c", registry.resolve("a"), "x")]
    asked = {"prod": "c", "new": "b"}
    for dry_run in (True, False):
        names, aliases = registry.apply(wanted, ["a"], aliases=asked, dry_run=dry_run)
        assert [(one.name, one.change) for one in names] == [("c", "created"), ("a", "removed")]
        assert [(one.alias, one.change, one.name, one.before) for one in aliases] == [
            ("new", "created", "b", None),
            ("old", "removed", None, "a"),
            ("prod", "replaced", "c", "a"),
        ]
        assert (registry.aliases.all() == asked) != dry_run
    assert {one.name: one.aliases for one in registry.list()[0]} == {"b": ("new",), "c": ("prod",)}
    _, again = registry.apply([], aliases=asked)
    assert {one.change for one in again} == {"unchanged"}
    assert registry.apply([])[1] == []
    before = registry.generation()
    wrong = {"x": "x", "y": "prod", "prod": "c", "new": "b", "z": "nobody", "c": "b"}
    with pytest.raises(AdapterFaults) as caught:
        registry.apply([], ["b"], aliases=wrong)
    assert [one.code for one in caught.value.faults] == [
        "alias_to_itself",
        "alias_of_alias",
        "alias_of_alias",  # c would be one
        "adapter_aliased",
        "adapter_not_found",
        "adapter_exists",
    ]
    assert registry.generation() == before


def test_a_registry_without_aliases_and_canaries_is_taken_over(registry: Registry) -> None:
    records = registry.list()
    registry.close()
    with sa.create_engine(registry.url, poolclass=sa.NullPool).begin() as connection:
        for table in (ALIASES, CANARIES):
            table.drop(connection)
        connection.execute(sa.update(STATE).values(schema_version=3))
    taken = Registry(registry.url, registry.store)
    assert taken.list() == records
    taken.aliases.set("prod", "a")
    assert taken.resolve("a").aliases == ("prod",)
