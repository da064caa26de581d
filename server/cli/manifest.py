"""A manifest: which adapters a server shall have, by name, with their sources and pins.

adapters:
  imdb: ./runs/imdb                     # a folder or an archive beside the manifest
  sst2:
    source: hf://org/sst2@main          # the server fetches it, where it is allowed to
    pinned: true
aliases:                                # left out: they stay as they are
  production: imdb
prune: false                            # true: names that are not here are removed
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ADAPTER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
KEYS: Final = ("adapters", "aliases", "prune")
ENTRY_KEYS: Final = ("source", "pinned", "remote")
ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz")


class ManifestFaults(Exception):
    """A manifest that cannot be applied.

    Args:
        faults: All of them, a line and its fix each.
        entries: Those that nothing is wrong with so far; a server may find more in their files.
    """

    def __init__(
        self, faults: Sequence[tuple[str, str | None]], entries: Sequence[ManifestEntry] = ()
    ) -> None:
        super().__init__("; ".join(text for text, _ in faults))
        self.faults = tuple(faults)
        self.entries = tuple(entries)


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One adapter of a manifest.

    Args:
        name: Under which it is registered.
        source: As it is written.
        folder: Where it lies on this machine: a folder or an archive; None: the server fetches it.
        pinned: None: as it is.
    """

    name: str
    source: str
    folder: Path | None
    pinned: bool | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a server shall have; ``prune``: and nothing else.

    ``aliases`` are all that there shall be, and the name of each; None: as they are.
    """

    entries: tuple[ManifestEntry, ...]
    prune: bool = False
    aliases: Mapping[str, str] | None = None


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; nothing of the adapters but whether they are there.

    Raises:
        ManifestFaults: Every fault in it.
    """
    import yaml

    try:
        told = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except OSError as error:
        raise ManifestFaults([(f"{path} cannot be read: {error.strerror}", None)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ManifestFaults([(f"{path} is not YAML: {said[:300]}", None)]) from None
    if not isinstance(told, dict) or not isinstance(told.get("adapters"), dict):
        fix = "adapters: and below it a line NAME: SOURCE for each"
        raise ManifestFaults([(f"{path} holds no adapters", fix)])
    faults: list[tuple[str, str | None]] = [
        (f"{path}: {key}: no such key", f"one of {', '.join(KEYS)}")
        for key in told
        if key not in KEYS
    ]
    if not isinstance(told.get("prune", False), bool):
        faults.append((f"{path}: prune is no yes or no", "prune: true, or leave it out"))
    aliases = told.get("aliases")
    if aliases is not None and not (
        isinstance(aliases, dict)
        and all(isinstance(one, str) for pair in aliases.items() for one in pair)
    ):
        faults.append((f"{path}: aliases are no lines ALIAS: NAME", "aliases: {production: imdb}"))
    entries = []
    for name, value in told["adapters"].items():
        try:
            entries.append(_manifest_entry(name, value, path.parent))
        except ManifestFaults as wrong:
            faults += wrong.faults
    if faults:
        raise ManifestFaults(faults, entries)
    return Manifest(tuple(entries), bool(told.get("prune", False)), aliases)


def manifest_of(paths: Sequence[Path], pinned: bool | None = None) -> Manifest:
    """A manifest of folders and archives, each under the name that it has there.

    Raises:
        ManifestFaults: Every fault in it.
    """
    entries, faults = [], list[tuple[str, str | None]]()
    for path in paths:
        try:
            entries.append(
                _manifest_entry(name_of_path(path), {"source": str(path), "pinned": pinned})
            )
        except ManifestFaults as wrong:
            faults += wrong.faults
    names = [one.name for one in entries]
    faults += [
        (f"two of the paths are named {name}", "register them one by one: hira adapters add NAME")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if faults:
        raise ManifestFaults(faults, entries)
    return Manifest(tuple(entries))


def name_of_path(path: Path) -> str:
    """The name of a folder, or of an archive without its ending, in the letters that names have."""
    name = path.resolve().name
    for end in ARCHIVES:
        name = name.removesuffix(end)
    return name.lower().replace(" ", "-")


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's folder, or an archive."""
    return (path / "adapter_config.json").is_file() or (
        path.is_file() and path.name.endswith(ARCHIVES)
    )


def _manifest_entry(name: Any, value: Any, beside: Path = Path()) -> ManifestEntry:
    shown = str(name)[:80]
    if not isinstance(value, dict):
        value = {"source": value}
    faults: list[tuple[str, str | None]] = [
        (f"{shown}: {key}: no such key", f"one of {', '.join(ENTRY_KEYS)}")
        for key in value
        if key not in ENTRY_KEYS
    ]
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        faults.append(
            (f"{shown}: the name is not allowed", "1 to 64 of a-z, 0-9, dot, dash, underscore")
        )
    for key in ("pinned", "remote"):
        if not isinstance(value.get(key), bool | None):
            faults.append((f"{shown}: {key} is no yes or no", f"{key}: true, or leave it out"))
    source = value.get("source")
    folder = None
    if not isinstance(source, str) or not source:
        faults.append((f"{shown}: there is no source", "a folder, an archive, hf:// or s3://"))
    elif "://" not in source and value.get("remote") is not True:
        folder = beside / Path(source).expanduser()
        if not is_adapter(folder):
            wrong = "holds no adapter_config.json" if folder.is_dir() else "is not there"
            if folder.is_file():
                wrong = f"is neither a folder nor one of {', '.join(ARCHIVES)}"
            faults.append((f"{shown}: {folder} {wrong}", None))
    if faults:
        raise ManifestFaults(faults)
    return ManifestEntry(str(name), str(source), folder, value.get("pinned"))


def _strict_loader() -> Any:
    """YAML's safe loader, that refuses a key which is there twice and anchors, which hide both."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.constructor.ConstructorError(None, None, "no aliases, please", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    mark = node.value[place][0].start_mark
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key} is there twice", mark
                    )
            return super().construct_mapping(node, deep=deep)

    return StrictLoader
