"""What the registry and the engine need of whatever holds the bytes of adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from adapters.intake.conversation import Conversation
from adapters.intake.file_names import Stamp
from adapters.registry.objects import Objects, StoreNote
from adapters.registry.remote_place import RemotePlace
from adapters.registry.remote_store import RemoteStore
from adapters.registry.store import Store


class AdapterBytes(Protocol):
    """Folders by version: a ``Store`` or a ``RemoteStore``, which say what each call does."""

    def open(self) -> None: ...

    def add(self, folder: Path) -> str: ...

    def path(self, version: str) -> Path: ...

    def sound_path(self, version: str) -> Path: ...

    def has(self, version: str) -> bool: ...

    def missing(self, versions: Collection[str]) -> set[str]: ...

    def versions(self) -> set[str]: ...

    def nbytes(self) -> int: ...

    def tensor_bytes(self, version: str) -> int: ...

    def conversation(self, version: str) -> Conversation: ...

    def stamp(self, version: str) -> Stamp: ...

    def touch(self, version: str) -> None: ...

    def idle(self, versions: Collection[str], idle_s: float) -> set[str]: ...

    def remove(self, version: str, *, idle_s: float = 0.0) -> bool: ...

    def is_owned_by(self, registry_id: str, needed: Callable[[], Collection[str]]) -> bool: ...

    def sweep(self) -> int: ...

    def is_sound(self, version: str) -> bool: ...

    def take_notes(self) -> Sequence[StoreNote]: ...

    def close(self) -> None: ...


def open_store(
    folder: Path, remote: RemotePlace | None = None, max_bytes: int | None = None
) -> AdapterBytes:
    """The store of a server. Nothing is asked of an object store yet.

    Args:
        folder: Of the bytes; of those that are kept on this disk where there is a ``remote``.
        remote: The object store; None for the folder alone.
        max_bytes: Of all bytes together.
    """
    if remote is None:
        return Store(folder, max_bytes)
    return RemoteStore(
        Objects(remote.url, endpoint=remote.endpoint),
        Store(folder),
        cache_bytes=remote.cache_bytes,
        max_bytes=max_bytes,
        least_idle_s=remote.least_idle_s,
    )
