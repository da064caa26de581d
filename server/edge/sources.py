from __future__ import annotations
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from server.edge.service import Service
from server.edge.uploads import Upload
from server.settings import Settings


@contextmanager
def operator_folder(source: str, settings: Settings) -> Iterator[Path]:
    yield Path(source)


@asynccontextmanager
async def fetched(source: str, service: Service) -> AsyncIterator[Path]:
    yield Path(source)


def unpacked(upload: Upload, settings: Settings) -> Path:
    return upload.folder
