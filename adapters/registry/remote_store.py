"""The bytes of adapters in an object store, and those that are used on this disk.

    <url>/versions/<version>.tar   one object holds all files of a version, so it is there whole
    <url>/held/<version>           empty; when it was written, the grace of the version began
    <url>/owner/<registry>         empty; the one registry that may delete objects here
    <url>/clock                    empty; written to learn what time it is there

A version is read from the cache: a ``Store`` with a budget of bytes, from which go first what was
used least lately. What is fetched is compared with its version before it is used, and once more
each time that it is loaded, as bytes in a folder are.
"""

from __future__ import annotations

import logging
import re
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    CacheDiskFull,
    CorruptFile,
    StoreFull,
    StoreUnavailable,
    full_disk_refused,
)
from adapters.intake.archive import WANTED, unpack
from adapters.intake.conversation import Conversation
from adapters.intake.file_names import Stamp
from adapters.intake.safetensors_header import MAX_TENSOR_FILE_BYTES
from adapters.registry.objects import Objects, StoreNote
from adapters.registry.store import Store, version_of

CACHE_BYTES: Final = 10 << 30
LOOKS: Final = 4  # objects that are looked for one by one rather than in a list of all
READ_WITHIN_S: Final = 60.0  # a version that was asked for so lately is not evicted: it is read
LEFT_OVER_S: Final = 3600.0  # what lies where files arrive for so long was left by a crash
CLOCK_KEPT_S: Final = 600.0
EVICTED_TO: Final = 0.95  # of the budget, so that not each new version evicts one
_DIGEST: Final = re.compile(r"[0-9a-f]{32}")

logger = logging.getLogger(__name__)


class RemoteStore:
    """As ``Store``, for many machines at once.

    Args:
        objects: Where the bytes are.
        cache: On this disk, without a limit of its own; other processes may share it.
        cache_bytes: Of the cache. What was asked for within READ_WITHIN_S stays, even beyond.
        max_bytes: Of all objects together; None for no limit. Two machines that add at once may
            go beyond by what one of them adds.
        least_idle_s: Bytes that were added, named or left by a name more lately are not removed,
            whoever asks for it: another machine's requests may need them.
    """

    def __init__(
        self,
        objects: Objects,
        cache: Store,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_bytes: int | None = None,
        least_idle_s: float = 0.0,
    ) -> None:
        self.root = cache.root
        self.max_bytes = max_bytes
        self.cache_bytes = cache_bytes
        self.least_idle_s = least_idle_s
        self._objects = objects
        self._cache = cache
        self._arriving = cache.root / "arriving"
        self._arriving.mkdir(parents=True, exist_ok=True)
        self._strangers_told: frozenset[str] | None = None  # as last written to the log
        self._lock = threading.Lock()
        self._fetching: dict[str, tuple[threading.Lock, list[None]]] = {}  # and who waits
        self._ahead: tuple[float, float] | None = None  # of our clock: its seconds, and since when

    def open(self) -> None:
        """Make calls ready, in a thread with the priority of this one; see ``Objects.open``."""
        self._objects.open()

    def add(self, folder: Path) -> str:
        """Put the adapter in ``folder`` into the object store; it is there when this returns.

        It is written even if it is there: what has been damaged is whole again.

        Returns:
            The version, as ``Store.add`` does.

        Raises:
            StoreFull: Over ``max_bytes``.
            CacheDiskFull: This disk is full.
            StoreUnavailable: The object store does not answer; no name can be on the version.
        """
        needed = sum(one.stat().st_size for one in folder.iterdir() if one.is_file())
        self._make_room(needed)
        version = self._cached(folder)
        self._cache.touch(version)  # it may have been there for long
        with self._arriving_folder() as arriving:
            packed = arriving / "packed.tar"
            self._pack(self._cache.path(version), packed)
            self._check_room(version, packed.stat().st_size)
            self._objects.put(_object_name(version), packed)
        return version

    def path(self, version: str) -> Path:
        """The folder of ``version`` on this disk, fetched where it is not there.

        Raises:
            AdapterNotFound: There is no such version in the object store.
            CorruptFile: Its object is not what its name says.
            StoreUnavailable: It is not on this disk, and the object store does not answer.
            CacheDiskFull: This disk is full.
        """
        return self._kept(version) or self._fetched(version)

    def sound_path(self, version: str) -> Path:
        """As ``path``, after reading every byte of it; damage on this disk is fetched anew, and
        once for all who have found it.

        Raises:
            As ``path``.
        """
        folder = self.path(version)
        found = self._cache_stamp(version)
        if self._is_sound_here(version):
            return folder
        with self._turn(version):
            # What another thread or process has fetched meanwhile is read by somebody: it stays.
            if found == self._cache_stamp(version):
                self._cache.remove(version)
            elif self._is_sound_here(version):
                return folder
            return self._fetched_in_turn(version)

    def is_sound(self, version: str) -> bool:
        """Whether the content of a version is what its name says; reads every byte of it."""
        try:
            self.sound_path(version)
        except StoreUnavailable:
            raise
        except AdapterError:
            return False
        return True

    def has(self, version: str) -> bool:
        """Whether the object store has the bytes of ``version``.

        Raises:
            StoreUnavailable: It does not answer.
        """
        return _is_version(version) and self._objects.facts(_object_name(version)) is not None

    def versions(self) -> set[str]:
        """Every version that the object store has.

        Raises:
            StoreUnavailable: It does not answer.
        """
        names = (name.removesuffix(".tar") for name in self._objects.listed("versions"))
        return {name for name in names if _is_version(name)}

    def missing(self, versions: Collection[str]) -> set[str]:
        """Those of ``versions`` that the object store does not have.

        Raises:
            StoreUnavailable: It does not answer.
        """
        if len(versions) <= LOOKS:  # a list is of all objects, a thousand in each call
            return {one for one in versions if not self.has(one)}
        return set(versions) - self.versions()

    def nbytes(self) -> int:
        """Bytes of all objects.

        Raises:
            StoreUnavailable: The object store does not answer.
        """
        return sum(one.nbytes for one in self._objects.listed("versions").values())

    def tensor_bytes(self, version: str) -> int:
        """Bytes of the tensors of ``version`` if it is on this disk, else 0; asks nobody."""
        return self._cache.tensor_bytes(version)

    def conversation(self, version: str) -> Conversation:
        """What the adapter brought for conversations and for generating; an empty one if nothing.

        Raises:
            As ``path``.
        """
        self.path(version)
        return self._cache.conversation(version)

    def stamp(self, version: str) -> Stamp:
        """What the file system says of the files of ``version`` on this disk; reads none of them.

        Raises:
            As ``path``.
        """
        self.path(version)
        return self._cache.stamp(version)

    def touch(self, version: str) -> None:
        """Start the grace of a version anew: it is about to be named, or was until now.

        Raises:
            AdapterNotFound: The object store does not have it.
            StoreUnavailable: It does not answer.
        """
        if not self.has(version):
            raise _missing(version, self._objects.url)
        self._objects.put(f"held/{version}", b"")

    def idle(self, versions: Collection[str], idle_s: float) -> set[str]:
        """Those of ``versions`` that were neither added nor named within ``idle_s`` seconds, nor
        within ``least_idle_s``; two lists of all objects, however many are asked for.

        Raises:
            StoreUnavailable: The object store does not answer.
        """
        written = self._objects.listed("versions")
        held = self._objects.listed("held")
        before = self._store_time() - max(idle_s, self.least_idle_s)
        found = set()
        for version in versions:
            of_it = (written.get(f"{version}.tar"), held.get(version))
            changed = [one.changed for one in of_it if one is not None]
            if of_it[0] is not None and max(changed) <= before:
                found.add(version)
        return found

    def remove(self, version: str, *, idle_s: float = 0.0) -> bool:
        """Delete an object, unless it was added or named within ``idle_s`` or ``least_idle_s``.

        Other machines keep what they have cached: the same content always has the same name.

        Raises:
            StoreUnavailable: The object store does not answer.
        """
        found = self._objects.facts(_object_name(version)) if _is_version(version) else None
        if found is None:
            return False
        held = self._objects.facts(f"held/{version}")
        newest = max(one.changed for one in (found, held) if one is not None)
        idle_s = max(idle_s, self.least_idle_s)
        if idle_s and self._store_time() - newest < idle_s:
            return False
        self._objects.delete(_object_name(version))
        if held is not None:
            self._objects.delete(f"held/{version}")
        self._cache.remove(version)
        return True

    def is_owned_by(self, registry_id: str, needed: Callable[[], Collection[str]]) -> bool:
        """Whether this registry may delete objects; where it may not, the log says so once.

        An object says whose they are. Where there is none yet, the registry is written down if
        the store is empty, or has something that the registry needs: to a registry that knows
        nothing of what is here, all of it would be garbage.

        Args:
            registry_id: What no other registry is called.
            needed: Tells the versions that the registry names or keeps; asked only where the
                owner is not known yet.

        Raises:
            StoreUnavailable: The object store does not answer.
        """
        owners = frozenset(self._objects.listed("owner"))
        if not owners:
            there = self.versions()
            if not there or not there.isdisjoint(needed()):
                self._objects.put(f"owner/{registry_id}", b"")
                owners = frozenset(self._objects.listed("owner"))  # another may do so as well
        if owners == {registry_id}:
            self._strangers_told = None
            return True
        if self._strangers_told != owners:
            self._strangers_told = owners
            logger.error(
                "Nothing is deleted from the adapter store %s: it belongs to %s, and this registry "
                "is %s. Give all servers of one prefix the same registry_url, or this one a prefix "
                "of its own. If only this registry uses it, put an empty object owner/%s there, "
                "and delete all others below owner/.",
                self._objects.url,
                "registry " + ", ".join(sorted(owners)) if owners else "a registry not known here",
                *(registry_id, registry_id),
            )
        return False

    def sweep(self) -> int:
        """Remove what interrupted writers left on this disk; returns how many."""
        left = [one for one in self._arriving.iterdir() if _age_s(one) > LEFT_OVER_S]
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return len(left) + self._cache.sweep()

    def try_it(self) -> None:
        """Write to the object store and read from it.

        Raises:
            StoreUnavailable: One of them cannot be done.
        """
        self._ahead = None
        self._store_time()

    def take_notes(self) -> list[StoreNote]:
        """What was asked of the cache and of the object store since the last call."""
        return self._objects.take_notes()

    def close(self) -> None:
        """Let go of connections; a later call makes new ones."""
        self._objects.close()

    # Inside

    def _kept(self, version: str) -> Path | None:
        """The folder in the cache, used now; None where it is not there."""
        try:
            self._cache.touch(version)  # it is the newest from now on, and stays
            found = self._cache.path(version)
        except (AdapterNotFound, FileNotFoundError):
            self._objects.note(StoreNote("cache", "miss"))
            return None
        self._objects.note(StoreNote("cache", "hit"))
        return found

    def _cached(self, folder: Path) -> str:
        """Copy a folder into the cache; returns its version."""
        try:
            return self._cache.add(folder)
        except StoreFull as error:  # the cache has no limit of its own: it is the disk
            raise CacheDiskFull(
                error.message, found=error.found, expected=error.expected, fix=error.fix
            ) from error

    def _fetched(self, version: str) -> Path:
        """Fetch a version into the cache; one thread of this process at a time does so."""
        if not _is_version(version):
            raise _missing(version, self._objects.url)
        with self._turn(version):
            return self._fetched_in_turn(version)

    def _fetched_in_turn(self, version: str) -> Path:
        try:
            return self._cache.path(version)  # another thread has fetched it meanwhile
        except AdapterNotFound:
            pass
        with self._arriving_folder() as arriving:
            packed, folder = arriving / "packed.tar", arriving / "files"
            folder.mkdir()
            found = self._objects.facts(_object_name(version))
            if found is None:
                raise _missing(version, self._objects.url)
            self._make_room(found.nbytes)
            with _cache_disk():
                try:
                    self._objects.get(_object_name(version), packed)
                except FileNotFoundError:
                    raise _missing(version, self._objects.url) from None
                _unpack_sound(version, packed, folder)
                packed.unlink()
            self._cached(folder)
        return self._cache.path(version)

    def _cache_stamp(self, version: str) -> Stamp | None:
        """Of what is in the cache now; None where it is not there."""
        try:
            return self._cache.stamp(version)
        except (AdapterNotFound, FileNotFoundError):
            return None

    def _is_sound_here(self, version: str) -> bool:
        try:
            return self._cache.is_sound(version)
        except FileNotFoundError:
            return False  # another reader of a damaged copy has removed it meanwhile

    @contextmanager
    def _turn(self, version: str) -> Iterator[None]:
        with self._lock:
            lock, users = self._fetching.setdefault(version, (threading.Lock(), []))
            users.append(None)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    self._fetching.pop(version, None)

    @contextmanager
    def _arriving_folder(self) -> Iterator[Path]:
        with (
            _cache_disk(),
            tempfile.TemporaryDirectory(dir=self._arriving, ignore_cleanup_errors=True) as folder,
        ):
            yield Path(folder)

    def _make_room(self, needed: int) -> None:
        """Evict what was used least lately, until ``needed`` bytes more are within the budget."""
        used = self._cache.nbytes()
        if used + needed <= self.cache_bytes:
            return
        kept = sorted(_ages(self._cache), reverse=True)
        for _, version, nbytes in kept:
            if used + needed <= self.cache_bytes * EVICTED_TO:
                return
            if self._cache.remove(version, idle_s=READ_WITHIN_S):
                used -= nbytes

    def _check_room(self, version: str, nbytes: int) -> None:
        if self.max_bytes is None:
            return
        there = self._objects.listed("versions")
        there.pop(f"{version}.tar", None)
        used = sum(one.nbytes for one in there.values())
        if used + nbytes > self.max_bytes:
            raise StoreFull(
                "The adapter store has no room for this adapter.",
                found=f"{used} bytes stored, {nbytes} more",
                expected=f"at most {self.max_bytes} bytes",
                fix="Remove adapters, or raise the store's size limit.",
            )

    def _store_time(self) -> float:
        """What time it is in the object store, in seconds since 1970."""
        now = time.monotonic()
        if self._ahead is None or now - self._ahead[1] > CLOCK_KEPT_S:
            self._objects.put("clock", b"")
            told = self._objects.facts("clock")
            if told is None:  # somebody has emptied the store
                raise StoreUnavailable("What was written to the adapter store is not there.")
            self._ahead = (time.time() - told.changed, now)
        return time.time() - self._ahead[0]

    def _pack(self, folder: Path, target: Path) -> None:
        with (
            _cache_disk(),
            tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for path in sorted(folder.iterdir()):
                if path.name in WANTED:
                    member = tarfile.TarInfo(path.name)
                    member.size = path.stat().st_size
                    with path.open("rb") as file:
                        archive.addfile(member, file)


def _cache_disk() -> AbstractContextManager[None]:
    return full_disk_refused("The disk of the cache of adapters", CacheDiskFull)


def _unpack_sound(version: str, packed: Path, folder: Path) -> None:
    try:
        unpack(packed, folder, max_bytes=MAX_TENSOR_FILE_BYTES)
        sound = version_of(folder) == version
    except StoreFull:
        raise
    except AdapterError:
        sound = False
    if not sound:
        raise CorruptFile(
            "The stored bytes of this adapter have changed.",
            found=f"an object with other content than {version}",
            expected="the content that was registered",
            fix="Register the adapter again.",
        )


def _ages(cache: Store) -> Iterator[tuple[float, str, int]]:
    """Of all that is cached: seconds since its last use, version, bytes."""
    for version in cache.versions():
        try:
            folder = cache.path(version)
            nbytes = sum(one.stat().st_size for one in folder.iterdir())
            yield _age_s(folder), version, nbytes
        except (AdapterNotFound, FileNotFoundError):
            continue  # another process has evicted it


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _is_version(version: str) -> bool:
    return bool(_DIGEST.fullmatch(version))


def _object_name(version: str) -> str:
    return f"versions/{version}.tar"


def _missing(version: str, url: str) -> AdapterNotFound:
    return AdapterNotFound(
        "The bytes of this version are not in the store.",
        found=version[:80],
        expected="an object of the adapter store",
        fix="Register the adapter again.",
    )
