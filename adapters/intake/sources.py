"""Where an adapter may come from, and a private copy of it: a folder, a hub, an object store.

Nothing is read that the operator has not allowed, and what is checked is what is stored: the files
are first copied, without following links, to a folder that no one else writes to.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from adapters.errors import SourceForbidden, SourceUnavailable, UploadTooLarge, full_disk_refused
from adapters.intake.archive import COPY_CHUNK_BYTES, WANTED
from adapters.intake.safetensors_header import MAX_TENSOR_FILE_BYTES

_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?:/(?P<folder>[\w./-]+?))?(?:@(?P<rev>[\w./-]+))?"
)
# A pickle is copied too, so that the checks can say what is wrong with it; it is never opened.
_PICKLE = "adapter_model.bin"
_COPIED = {**WANTED, _PICKLE: _PICKLE}


class Sources:
    """Brings adapters in.

    Args:
        staging: A folder for the copies; made when missing.
        roots: Folders below which local paths are allowed.
        allow_hub: Whether ``hf://`` is.
        allow_s3: Whether ``s3://`` is.
        max_bytes: Most bytes of one adapter.
    """

    def __init__(
        self,
        staging: Path,
        roots: Sequence[Path] = (),
        *,
        allow_hub: bool = False,
        allow_s3: bool = False,
        max_bytes: int = MAX_TENSOR_FILE_BYTES,
    ) -> None:
        self.staging = staging
        self.roots = tuple(root.resolve() for root in roots)
        self.allow_hub = allow_hub
        self.allow_s3 = allow_s3
        self.max_bytes = max_bytes

    @contextmanager
    def fetch(self, source: str, *, trusted: bool = False) -> Iterator[Path]:
        """A folder with a copy of the adapter at ``source``; gone after the ``with`` block.

        Args:
            source: A path, ``hf://org/repo[/folder][@revision]`` or ``s3://bucket/folder``.
            trusted: The operator named it at the start: any path or scheme is allowed.

        Raises:
            SourceForbidden: Not allowed by the settings.
            SourceUnavailable: Allowed, but it could not be read.
            UploadTooLarge: More than ``max_bytes``.
            StoreFull: The disk is full.
        """
        self.staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.staging, prefix="source-") as name:
            target = Path(name)
            try:
                with full_disk_refused("The disk"):
                    self._fetch_into(target, source, trusted=trusted)
            except (ValueError, RuntimeError) as error:  # a NUL in the path, links in a circle
                raise SourceUnavailable(
                    "The source has no readable address.", found=f"{source[:200]!r}: {error}"[:300]
                ) from error
            except OSError as error:
                raise SourceUnavailable(
                    "The source could not be read.",
                    found=f"{source[:200]}: {error.strerror or type(error).__name__}",
                    expected="a folder that this server may read",
                ) from error
            yield target

    def _fetch_into(self, target: Path, source: str, *, trusted: bool) -> None:
        if source.startswith("hf://"):
            self._from_hub(source, target, allowed=self.allow_hub or trusted)
        elif source.startswith("s3://"):
            self._from_s3(source, target, allowed=self.allow_s3 or trusted)
        elif "://" in source:
            raise SourceForbidden(
                "This kind of source is not known.",
                found=source.partition("://")[0][:40],
                expected="a path, hf:// or s3://",
            )
        else:
            self._from_folder(Path(source), target, trusted=trusted)

    def _from_folder(self, folder: Path, target: Path, *, trusted: bool) -> None:
        if not folder.is_absolute() and not trusted:
            raise SourceForbidden(
                "The path is not absolute.", found=str(folder)[:200], expected="an absolute path"
            )
        # Links are resolved before the comparison, so none of them leaves the root.
        real = folder.resolve()
        if not trusted and not any(real.is_relative_to(root) for root in self.roots):
            raise SourceForbidden(
                "The path is outside every allowed folder.",
                found=str(folder)[:200],
                expected="a path below one of the source roots",
                fix="Ask the operator for --source-root, or upload the files.",
            )
        handle = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # A root swapped for a link meanwhile shows in where the open folder really is.
            now = Path(f"/proc/self/fd/{handle}")
            if now.exists() and now.resolve() != real:
                raise SourceForbidden("The folder moved while it was read.", found=str(real))
            left = self.max_bytes
            for name, flat in _COPIED.items():
                left -= self._copy_nested(handle, name, target / flat, left)
        finally:
            os.close(handle)

    def _copy_nested(self, folder: int, name: str, target: Path, left: int) -> int:
        """``_copy_plain`` of a name that may lie one folder down; that folder is no link either."""
        below, _, plain = name.rpartition("/")
        if not below:
            return self._copy_plain(folder, plain, target, left)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(below, flags, dir_fd=folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise SourceForbidden(
                "A folder of the source is a link, or no folder.",
                found=below,
                expected="plain folders",
                fix="Copy the folder itself into the source.",
            ) from error
        try:
            return self._copy_plain(handle, plain, target, left)
        finally:
            os.close(handle)

    def _copy_plain(self, folder: int, name: str, target: Path, left: int) -> int:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise SourceForbidden(
                "A file of the source is a link.",
                found=name,
                expected="plain files",
                fix="Copy the file itself into the folder.",
            ) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)  # fdopen would refuse a folder too, and leave it open
            raise SourceForbidden("A file of the source is not a plain file.", found=name)
        with os.fdopen(handle, "rb") as reader:
            return self._copy(reader, target, left)

    def _copy(self, reader: IO[bytes], target: Path, left: int) -> int:
        written = 0
        with target.open("xb") as writer:
            while chunk := reader.read(COPY_CHUNK_BYTES):
                written += len(chunk)
                if written > left:
                    raise self._too_large(target.name)
                writer.write(chunk)
        return written

    def _too_large(self, name: str) -> UploadTooLarge:
        return UploadTooLarge(
            "The adapter is too large.",
            found=f"{name} goes beyond the limit",
            expected=f"at most {self.max_bytes} bytes in all",
        )

    def _from_hub(self, source: str, target: Path, *, allowed: bool) -> None:
        found = _HUB.fullmatch(source)
        if not allowed or found is None:
            raise _forbidden(source, "hf://org/repo@revision", "HIRA_ALLOW_HUB=true")
        from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        folder = found["folder"] or ""
        if folder and not all(part.strip(".") for part in folder.split("/")):
            raise _forbidden(source, "hf://org/repo/folder@revision", "HIRA_ALLOW_HUB=true")
        patterns = [f"{folder}/{name}" if folder else name for name in _COPIED]
        get: Any = partial(snapshot_download, found["repo"], allow_patterns=patterns)
        try:
            try:
                planned = get(revision=found["rev"], dry_run=True)
            except DryRunError:  # the hub is out of reach: what is in its cache has to do
                snapshot = get(revision=found["rev"], local_files_only=True)
            else:
                if sum(file.file_size or 0 for file in planned) > self.max_bytes:
                    raise self._too_large(source[:200])
                # The commit that was measured, whatever the revision means by now.
                snapshot = get(revision=planned[0].commit_hash if planned else found["rev"])
        except (HTTPError, ValueError) as cause:
            raise SourceUnavailable(
                "The hub did not give the adapter.", found=str(cause)[:200]
            ) from cause
        left = self.max_bytes
        for name, flat in _COPIED.items():
            path = Path(snapshot) / folder / name
            if path.is_file():  # a link into the hub's own cache
                with path.open("rb") as reader:
                    left -= self._copy(reader, target / flat, left)

    def _from_s3(self, source: str, target: Path, *, allowed: bool) -> None:
        if not allowed:
            raise _forbidden(source, "s3://bucket/folder", "HIRA_ALLOW_S3=true")
        try:
            import fsspec

            faults = importlib.import_module("botocore.exceptions")
            files = fsspec.filesystem("s3")
        except ImportError as cause:
            raise SourceUnavailable(
                "This server is installed without s3fs.", fix="pip install 'hira-server[s3]'"
            ) from cause
        left = self.max_bytes
        for name, flat in _COPIED.items():
            try:
                with files.open(f"{source.rstrip('/')}/{name}", "rb") as reader:
                    left -= self._copy(reader, target / flat, left)
            except FileNotFoundError:
                continue
            except (faults.BotoCoreError, faults.ClientError) as cause:
                raise SourceUnavailable(
                    "The object store did not give the adapter.", found=str(cause)[:200]
                ) from cause


def _forbidden(source: str, form: str, setting: str) -> SourceForbidden:
    return SourceForbidden(
        "This source is not allowed.",
        found=source[:200],
        expected=f"{form}, where the operator allows it",
        fix=f"Start the server with {setting}, or upload the files.",
    )
