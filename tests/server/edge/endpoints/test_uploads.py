"""Multipart uploads: no number of parts, fields or headers that a client chooses is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from python_multipart.multipart import MultipartParser

from server.edge.endpoints.uploads import FIELDS_MAX, MAX_UPLOAD_FILES, _MultipartCallbacks
from server.errors import Refusal

FIELD = 'Content-Disposition: form-data; name="{}"'
FILE = 'Content-Disposition: form-data; name="files"; filename="{}"'


def parse(folder: Path, *parts: tuple[str, str]) -> _MultipartCallbacks:
    text = "".join(f"--b\r\n{head}\r\n\r\n{body}\r\n" for head, body in parts) + "--b--\r\n"
    found = _MultipartCallbacks(folder)
    callbacks: Any = found.callbacks()
    try:
        MultipartParser(b"b", callbacks).write(text.encode())
    finally:
        found.close()
    return found


def test_fields_and_files_are_taken(tmp_path: Path) -> None:
    found = parse(tmp_path, (FIELD.format("name"), " mine "), (FILE.format("a.json"), "{}"))
    assert found.complete
    assert found.upload.fields == {"name": "mine"}
    assert [one.read_text() for one in found.upload.files] == ["{}"]


def test_as_many_fields_as_may_be_are_taken_and_one_more_is_not(tmp_path: Path) -> None:
    fields = [(FIELD.format(f"f{at}"), "x") for at in range(FIELDS_MAX + 1)]
    assert len(parse(tmp_path, *fields[:-1]).upload.fields) == FIELDS_MAX
    with pytest.raises(Refusal) as caught:
        parse(tmp_path, *fields)
    assert (caught.value.code, caught.value.faults[0].found) == (
        "malformed_body",
        f"more than {FIELDS_MAX} fields",
    )


def test_as_many_files_as_may_be_are_taken_and_one_more_is_not(tmp_path: Path) -> None:
    files = [(FILE.format(f"f{at}"), "x") for at in range(MAX_UPLOAD_FILES + 1)]
    with pytest.raises(Refusal, match="malformed_body"):
        parse(tmp_path, *files)


@pytest.mark.parametrize("name", ["name", ""])
def test_a_field_that_comes_twice_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        parse(tmp_path, (FIELD.format(name), "a"), (FIELD.format(name), "b"))
    assert caught.value.faults[0].found == f"two fields are called {name}"


def test_headers_of_a_part_are_bounded_together(tmp_path: Path) -> None:
    head = "\r\n".join([FIELD.format("name"), *(f"X-{at}: {'x' * 1000}" for at in range(6))])
    with pytest.raises(Refusal) as caught:
        parse(tmp_path, (head, "x"))
    assert caught.value.faults[0].found == "the headers of a part are too long"
