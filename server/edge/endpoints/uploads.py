"""Multipart uploads, written to disk as they arrive.

LitServe switches Starlette's parser to keep whole files in memory; adapters may be gigabytes, so
the parts are taken here. Names of files are reduced to plain names: no path leaves the folder. Of
``1_Pooling/config.json`` and its like the folder counts: they get the flat name they are stored by.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from adapters.intake.pooling import NESTED
from server.edge.service import Service
from server.errors import Refusal

MAX_UPLOAD_FILES: Final = 64
FIELDS_MAX: Final = 16
FIELD_BYTES_MAX: Final = 4096
HEADER_BYTES_MAX: Final = 4096  # of all headers of one part
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass
class Upload:
    """What a multipart body held."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


@asynccontextmanager
async def received(request: Request, service: Service) -> AsyncIterator[Upload]:
    """Take a multipart body to a folder of its own, which is gone after the ``with`` block.

    Raises:
        Refusal: invalid_request, unsafe_format for a file's name, store_full for a full disk.
    """
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if content_type != b"multipart/form-data" or not boundary:
        raise _malformed_upload("no boundary in the content type")
    folder = service.settings.data_dir / "staging" / f"upload-{uuid.uuid4().hex}"
    try:
        await service.slow_work.run(lambda: folder.mkdir(parents=True, mode=0o700), "uploads")
        parts = _MultipartCallbacks(folder)
        try:
            parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
            async for chunk in request.stream():
                if chunk:
                    written = partial(parser.write, chunk)
                    await service.slow_work.run(written, "uploads", owed=True)
            parser.finalize()
        except FormParserError as error:
            raise _malformed_upload(str(error)) from None
        except OSError as error:
            raise Refusal.because(
                "store_full", "The upload could not be written.", found=error.strerror
            ) from None
        finally:
            parts.close()
        if not parts.complete:
            raise _malformed_upload("it ends in the middle of a part")
        yield parts.upload
    finally:
        await service.slow_work.run(
            lambda: shutil.rmtree(folder, ignore_errors=True), "uploads", owed=True
        )


class _MultipartCallbacks:
    """The callbacks of the parser: where the bytes of the present part go."""

    def __init__(self, folder: Path) -> None:
        self.upload = Upload(folder)
        self.complete = False
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._header = b""
        self._value = b""
        self._file: BinaryIO | None = None
        self._field: str | None = None
        self._text = b""

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers.clear()
        self._header_bytes = 0
        self._field, self._text = None, b""

    def _header_name(self, raw: bytes, start: int, end: int) -> None:
        self._header += raw[start:end]
        self._bound_headers(end - start)

    def _header_value(self, raw: bytes, start: int, end: int) -> None:
        self._value += raw[start:end]
        self._bound_headers(end - start)

    def _bound_headers(self, more: int) -> None:
        self._header_bytes += more
        if self._header_bytes > HEADER_BYTES_MAX:
            raise _malformed_upload("the headers of a part are too long")

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        file_name, name = options.get(b"filename"), options.get(b"name", b"")
        if file_name is None:
            self._field = name.decode("utf-8", "replace")
            if self._field in self.upload.fields:
                raise _malformed_upload(f"two fields are called {self._field[:80]}")
            if len(self.upload.fields) >= FIELDS_MAX:
                raise _malformed_upload(f"more than {FIELDS_MAX} fields")
            return
        steps = file_name.decode("utf-8", "replace").replace("\\", "/").split("/")
        plain = NESTED.get("/".join(steps[-2:]), steps[-1])
        if not FILE_NAME.fullmatch(plain):
            raise Refusal.because(
                "unsafe_format",
                "A file of the upload has a name that is not allowed.",
                found=repr(plain)[:80],
                expected="letters, digits, dot, dash and underscore",
                field="files",
            )
        path = self.upload.folder / plain
        if path in self.upload.files:
            raise _malformed_upload(f"two files are called {plain}")
        if len(self.upload.files) >= MAX_UPLOAD_FILES:
            raise _malformed_upload(f"more than {MAX_UPLOAD_FILES} files")
        self.upload.files.append(path)
        self._file = path.open("xb")

    def _data(self, raw: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(raw[start:end])
            return
        self._text += raw[start:end]
        if len(self._text) > FIELD_BYTES_MAX:
            raise _malformed_upload(f"the field {self._field} is too long")

    def _end(self) -> None:
        if self._file is not None:
            self.close()
        elif self._field is not None:
            self.upload.fields[self._field] = self._text.decode("utf-8", "replace").strip()

    def _all(self) -> None:
        self.complete = True


def _malformed_upload(found: str) -> Refusal:
    return Refusal.because(
        "malformed_body",
        "The multipart body cannot be read.",
        found=found,
        expected="multipart/form-data with the fields name, replace, pinned, preload and files",
    )
