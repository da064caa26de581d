"""From what an admin or the operator names to a folder that can be checked and stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.errors import AdapterError
from adapters.intake.archive import is_archive, unpack
from adapters.intake.sources import Sources
from server.edge.endpoints.uploads import Upload
from server.edge.service import Service
from server.errors import Refusal
from server.settings import Settings


def sources_of(settings: Settings) -> Sources:
    """Sources as the operator allows them."""
    return Sources(
        settings.data_dir / "staging",
        settings.source_root,
        allow_hub=settings.allow_hub,
        allow_s3=settings.allow_s3,
        max_bytes=int(settings.max_upload_bytes),
    )


@asynccontextmanager
async def fetched(source: str, service: Service) -> AsyncIterator[Path]:
    """A private copy of what an admin named; gone after the ``with`` block.

    Raises:
        Refusal: source_forbidden, source_unavailable, upload_too_large or store_full.
    """
    copy = sources_of(service.settings).fetch(source)
    try:
        folder = await service.slow_work.run(copy.__enter__, "sources")
    except AdapterError as error:
        raise Refusal.of(error) from None
    try:
        yield folder
    finally:
        await service.slow_work.run(lambda: copy.__exit__(None, None, None), "sources", owed=True)


def unpacked(upload: Upload, settings: Settings) -> Path:
    """The folder of an upload's files; of a single archive, what it holds.

    Raises:
        AdapterError: What is wrong with the archive.
    """
    if len(upload.files) != 1 or not is_archive(upload.files[0].name):
        return upload.folder
    target = upload.folder / "unpacked"
    target.mkdir()
    return unpack(upload.files[0], target, max_bytes=int(settings.max_upload_bytes))
