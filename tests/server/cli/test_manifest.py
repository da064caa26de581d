"""A manifest is read as a whole: every fault in it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli.manifest import ManifestFaults, manifest_of, read_manifest


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "adapters.yaml"
    path.write_text(text)
    return path


def test_names_sources_and_pins_are_read(tmp_path: Path) -> None:
    adapter(tmp_path / "runs" / "imdb")
    (tmp_path / "packed.zip").write_bytes(b"")
    text = """
adapters:
  imdb: runs/imdb
  packed: {source: packed.zip, pinned: true}
  far: hf://org/far@main
  there: {source: /data/there, remote: true, pinned: false}
aliases: {prod: imdb}
prune: true
"""
    found = read_manifest(written(tmp_path, text))
    assert found.prune
    assert found.aliases == {"prod": "imdb"}
    assert [(one.name, one.folder, one.pinned) for one in found.entries] == [
        ("imdb", tmp_path / "runs/imdb", None),
        ("packed", tmp_path / "packed.zip", True),
        ("far", None, None),
        ("there", None, False),
    ]


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = """
adapters:
  Big Name: hf://org/a
  a: empty
  b: {source: nowhere, pined: true}
  c: {pinned: maybe}
  d: 7
prune: perhaps
aliases: [a]
extra: 1
"""
    with pytest.raises(ManifestFaults) as caught:
        read_manifest(written(tmp_path, text))
    told = [text for text, _ in caught.value.faults]
    assert [one.removeprefix(f"{tmp_path}/") for one in told] == [
        "adapters.yaml: extra: no such key",
        "adapters.yaml: prune is no yes or no",
        "adapters.yaml: aliases are no lines ALIAS: NAME",
        "Big Name: the name is not allowed",
        f"a: {tmp_path}/empty holds no adapter_config.json",
        "b: pined: no such key",
        f"b: {tmp_path}/nowhere is not there",
        "c: pinned is no yes or no",
        "c: there is no source",
        "d: there is no source",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapters: [", "is not YAML"),
        ("- a", "holds no adapters"),
        ("adapters: {a: hf://a/b, a: hf://c/d}", "a is there twice"),
        ("adapters: {a: &x hf://a/b, b: *x}", "no aliases"),
        ("adapters: {a: !!python/object/apply:os.getcwd []}", "is not YAML"),
        ("adapters: {[1]: hf://a/b}", "is not YAML"),
    ],
)
def test_what_is_no_manifest_is_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestFaults, match=said):
        read_manifest(written(tmp_path, text))
    with pytest.raises(ManifestFaults, match="cannot be read"):
        read_manifest(tmp_path / "nowhere.yaml")


def test_paths_become_names_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "x" / "My Run"), adapter(tmp_path / "y" / "other")]
    assert [one.name for one in manifest_of(paths).entries] == ["my-run", "other"]
    with pytest.raises(ManifestFaults, match="two of the paths are named other"):
        manifest_of([*paths, adapter(tmp_path / "z" / "other")])
