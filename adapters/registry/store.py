"""The bytes of adapters, by content: what is the same is kept once, what is there is whole.

    <root>/versions/<version>/   what it has of ``STORED_FILES``: two are always there; and
                                 ``KEPT_CONVERSATION_FILE``, made of the files that it came with
    <root>/staging/<name>/       being written; swept when the store is opened for checking

An entry appears by one rename of a folder whose files are already on the disk, so a crash leaves
either all of it or nothing. Names, and which versions are still needed, are the registry's affair.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError, AdapterNotFound, CorruptFile, StoreFull, full_disk_refused
from adapters.intake.archive import COPY_CHUNK_BYTES
from adapters.intake.checkpoint import CONFIG_FILE, STORED_FILES, TASK_CONFIG_FILE
from adapters.intake.conversation import (
    KEPT_CONVERSATION_FILE,
    Conversation,
    conversation_bytes,
    stored_conversation,
)
from adapters.intake.file_names import Stamp
from adapters.intake.model_config import HEAD_FIELDS
from adapters.intake.pooling import MODULES_FILE, POOLING_FILES, located
from adapters.intake.safetensors_header import TENSOR_FILE, open_regular, read_header
from adapters.intake.strict_json import MAX_JSON_BYTES, strict_json, strict_list
from adapters.registry.objects import StoreNote

_REQUIRED = (CONFIG_FILE, TENSOR_FILE)
_TASK_FIELDS = ("model_type", "architectures", "id2label", "num_labels", "problem_type")
_VERSION = re.compile(r"[0-9a-f]{32}")


class Store:
    """Adapter folders by version, on one file system.

    Safe to use from several threads and processes at once.

    Args:
        root: Made when missing.
        max_bytes: Most bytes of all entries together; None for the disk's own limit.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._versions = root / "versions"
        self._staging = root / "staging"
        self._lock_file = root / "lock"  # held while bytes are counted and an entry appears
        self._sizes: dict[str, int] = {}  # by version: an entry never changes while it is there
        for folder in (self._versions, self._staging):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self) -> None:
        """There is nothing to make ready."""

    def add(self, folder: Path) -> str:
        """Copy the adapter in ``folder`` into the store; durable when this returns.

        Args:
            folder: A checked adapter; only the files of an adapter are taken.

        Returns:
            The version: the first 32 hex digits of the content's SHA-256.

        Raises:
            StoreFull: Over ``max_bytes``, or the disk is full; nothing is left behind.
        """
        staged = self._staging / uuid.uuid4().hex
        with full_disk_refused("The disk of the adapter store"):
            try:
                staged.mkdir()
                if self.max_bytes is not None and not self.has(version_of(folder)):
                    self._check_room(folder)  # before anything is copied
                for name, path in _present(folder).items():
                    _copy_durably(path, staged / name)
                said = conversation_bytes(folder, _config(folder))
                if said:
                    _copy_durably(io.BytesIO(said), staged / KEPT_CONVERSATION_FILE)
                version = version_of(staged)
                _sync_folder(staged)
                with self._alone():
                    # Counted again: others may have stored theirs while this one was copied.
                    if not self.has(version):
                        self._check_room(staged)
                    self._publish(staged, version)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        return version

    def path(self, version: str) -> Path:
        """The folder of ``version``; it never changes while it is there.

        Raises:
            AdapterNotFound: There is no such version in this store.
        """
        folder = self._versions / version
        if not self.has(version):
            raise AdapterNotFound(
                "The bytes of this version are not in the store.",
                found=version[:80],
                expected=f"a folder in {self._versions}",
                fix="Register the adapter again.",
            )
        return folder

    def has(self, version: str) -> bool:
        """Whether the bytes of ``version`` are here: every file that an adapter must have."""
        folder = self._versions / version
        return bool(_VERSION.fullmatch(version)) and all(
            (folder / name).is_file() for name in _REQUIRED
        )

    def versions(self) -> set[str]:
        """Every version whose bytes are here."""
        return {
            entry.name for entry in os.scandir(self._versions) if _VERSION.fullmatch(entry.name)
        }

    def nbytes(self) -> int:
        """Bytes of all entries."""
        known = self._sizes
        self._sizes = {
            version: known.get(version) or _folder_bytes(self._versions / version)
            for version in self.versions()
        }
        return sum(self._sizes.values())

    def missing(self, versions: Collection[str]) -> set[str]:
        """Those of ``versions`` whose bytes are not here."""
        return {one for one in versions if not self.has(one)}

    def tensor_bytes(self, version: str) -> int:
        """Bytes of the tensors of ``version``; 0 where it is not here."""
        try:
            return (self._versions / version / TENSOR_FILE).stat().st_size
        except OSError:
            return 0

    def conversation(self, version: str) -> Conversation:
        """What the adapter brought for conversations and for generating; an empty one if nothing.

        Raises:
            AdapterNotFound: There is no such version in this store.
            CorruptFile: It is damaged.
        """
        path = self.path(version) / KEPT_CONVERSATION_FILE
        if not path.exists():
            return Conversation()
        with open_regular(path) as file:
            return stored_conversation(file.read())

    def stamp(self, version: str) -> Stamp:
        """What the file system says of the files of ``version``; reads none of them.

        Writing to a file, cutting it or putting another in its place changes its entry, whatever
        its time of modification is set to afterwards. A medium that forgets changes nothing here.

        Raises:
            AdapterNotFound: There is no such version in this store.
        """
        try:
            return tuple(
                sorted(
                    (
                        entry.name,
                        (told := entry.stat()).st_ino,
                        told.st_size,
                        told.st_mtime_ns,
                        told.st_ctime_ns,
                    )
                    for entry in os.scandir(self.path(version))
                )
            )
        except FileNotFoundError:
            self.path(version)  # removed meanwhile: says so
            raise

    def touch(self, version: str) -> None:
        """Start the grace of an entry anew: it is about to be named."""
        os.utime(self.path(version))

    def idle(self, versions: Collection[str], idle_s: float) -> set[str]:
        """Those of ``versions`` that were neither added nor named within ``idle_s`` seconds."""
        found, now = set(), time.time()
        for version in versions:
            with suppress(FileNotFoundError):
                if now - (self._versions / version).stat().st_mtime >= idle_s:
                    found.add(version)
        return found

    def remove(self, version: str, *, idle_s: float = 0.0) -> bool:
        """Delete an entry, unless it was added or named within ``idle_s`` seconds.

        The folder is first renamed away, so a reader finds all of it or nothing.
        """
        folder = self._versions / version
        doomed = self._staging / f"removed-{uuid.uuid4().hex}"
        try:
            if idle_s and time.time() - folder.stat().st_mtime < idle_s:
                return False
            os.rename(folder, doomed)
        except FileNotFoundError:
            return False
        _sync_folder(self._versions)
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def is_owned_by(self, registry_id: str, needed: Callable[[], Collection[str]]) -> bool:
        """Whether a registry may delete what it does not need: a folder has one registry only."""
        del registry_id, needed
        return True

    def sweep(self) -> int:
        """Remove what interrupted writers left; returns how many. Only while nobody writes."""
        left = list(self._staging.iterdir())
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return len(left)

    def is_sound(self, version: str) -> bool:
        """Whether the content of an entry is what its name says; reads every byte of it."""
        folder = self._versions / version
        try:
            # Entries of former releases were named for less: what they did not serve then. Asked
            # only where it is needed, for it reads every byte once more.
            return version == version_of(folder) or version == version_of(folder, former=True)
        except AdapterError:
            return False

    def sound_path(self, version: str) -> Path:
        """The folder of ``version``, after reading every byte of it: disks forget, people edit.

        Raises:
            AdapterNotFound: There is no such version in this store.
            CorruptFile: Its content is not what its name says.
        """
        folder = self.path(version)
        if not self.is_sound(version):
            raise CorruptFile(
                "The stored bytes of this adapter have changed.",
                found=f"other content than {version}",
                expected="the content that was registered",
                fix="Register the adapter again.",
            )
        return folder

    def take_notes(self) -> Sequence[StoreNote]:
        """What was asked of an object store since the last call: nothing."""
        return ()

    def close(self) -> None:
        """Nothing is open."""

    def _check_room(self, folder: Path) -> None:
        if self.max_bytes is None:
            return
        needed = sum(path.stat().st_size for path in _present(folder).values())
        needed += len(conversation_bytes(folder, _config(folder)))
        used = self.nbytes()
        if used + needed > self.max_bytes:
            raise StoreFull(
                "The adapter store has no room for this adapter.",
                found=f"{used} bytes stored, {needed} more",
                expected=f"at most {self.max_bytes} bytes",
                fix="Remove adapters, or raise the store's size limit.",
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else, in whatever thread or process, adds an entry meanwhile."""
        handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # and with it the lock

    def _publish(self, staged: Path, version: str) -> None:
        folder = self._versions / version
        try:
            os.rename(staged, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.is_sound(version):
                os.utime(folder)  # the same content is there already
            else:
                self.remove(version)
                os.rename(staged, folder)
        _sync_folder(self._versions)


def version_of(folder: Path, *, former: bool = False, conversation: bool = True) -> str:
    """The version of the adapter in ``folder``: a digest of what decides its answers.

    SHA-256 over the configuration's values, the tensors by name (dtype, shape, bytes), the
    labels, what else decides how a head is read, and the files that say how a vector is made
    (``POOLING_FILES``), and of an adapter that may generate what it brings for that
    (``conversation_bytes``); the order of keys and tensors makes no difference, the model card
    neither.

    Args:
        folder: Of the adapter.
        former: As releases did that did not know those fields of a head and nothing of
            conversations; what they stored has no files that say how a vector is made.
        conversation: False: as the releases between those and this one did.

    Raises:
        CorruptFile: A file is missing or malformed.
    """
    digest = hashlib.sha256()
    config = _config(folder)
    digest.update(_canonical(config))
    said = conversation_bytes(folder, config) if conversation and not former else b""
    if said:
        digest.update(said)
    if (folder / TASK_CONFIG_FILE).exists():
        task = strict_json(_read_bytes(folder / TASK_CONFIG_FILE), TASK_CONFIG_FILE)
        digest.update(_canonical({name: task.get(name) for name in _TASK_FIELDS}))
        head = {name: task[name] for name in sorted(HEAD_FIELDS & task.keys())}
        if head and not former:
            digest.update(_canonical(head))
    declared = located(folder)
    for name in POOLING_FILES:
        if name in declared:
            parse = strict_list if name == MODULES_FILE else strict_json
            digest.update(_canonical([name, parse(_read_bytes(declared[name]), name)]))
    with open_regular(folder / TENSOR_FILE) as file:
        for name, entry in sorted(read_header(file).items()):
            digest.update(_canonical([name, str(entry.dtype), list(entry.shape)]))
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = file.read(min(left, COPY_CHUNK_BYTES))
                if not chunk:
                    raise CorruptFile(f"{TENSOR_FILE} ends inside {name}.")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()[:32]


def versions_of(folder: Path) -> set[str]:
    """The version of the adapter in ``folder``, and what former releases called its content."""
    return {
        version_of(folder),
        version_of(folder, conversation=False),
        version_of(folder, former=True),
    }


def _config(folder: Path) -> dict[str, Any]:
    return strict_json(_read_bytes(folder / CONFIG_FILE), CONFIG_FILE)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(MAX_JSON_BYTES + 1)


def _present(folder: Path) -> dict[str, Path]:
    """Where the files of an adapter are, by the names that they are stored under."""
    paths = {name: folder / name for name in STORED_FILES} | located(folder)
    return {name: path for name, path in paths.items() if name in _REQUIRED or path.is_file()}


def _copy_durably(source: Path | io.BytesIO, target: Path) -> None:
    opened = open_regular(source) if isinstance(source, Path) else nullcontext(source)
    with opened as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, COPY_CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return 0  # removed meanwhile
