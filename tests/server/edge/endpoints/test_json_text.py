"""JSON bodies and answers of any size: what is refused, which thread is at work."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from server.edge.endpoints import body as bodies
from server.edge.endpoints import json_text
from server.edge.endpoints.answers import json_response
from server.edge.endpoints.application import SHORT_REPR
from server.edge.endpoints.body import posted, read_json
from server.edge.endpoints.json_text import (
    AT_ONCE_BYTES,
    JSON_SLICE_CHARACTERS,
    VALUES_MAX,
    has_more_values,
    json_pieces,
    parse_json,
    written,
)
from server.edge.endpoints.schemas import MAX_UNKNOWN, GenerateRequestBody, PredictRequest
from server.edge.endpoints.schemas_openai import CompletionRequest
from server.errors import Refusal

T = TypeVar("T")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(), inner, max_size=6),
    max_leaves=60,
)


class Threads:
    """What endpoints need of the service here: a thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    @property
    def slow_work(self) -> Any:
        return self

    async def run(self, work: Callable[[], T], pool: str, *, size_bytes: int) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def sent(raw: bytes, content_type: str = "application/json") -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": raw, "more_body": False}

    headers = [(b"content-type", content_type.encode())]
    scope = {"type": "http", "headers": headers, "hira_service": Threads()}
    return Request(scope, receive)


def counted(content: Any) -> int:
    """Commas and opening brackets, value by value."""
    if isinstance(content, dict | list):
        inner = content.values() if isinstance(content, dict) else content
        return 1 + max(0, len(content) - 1) + sum(map(counted, inner))
    return 0


@given(VALUES, st.sampled_from((1, 2, 3, 7, 64)))
def test_values_are_counted_outside_of_texts_only(content: Any, slice_characters: int) -> None:
    text, there = json.dumps(content, ensure_ascii=False), counted(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "JSON_SLICE_CHARACTERS", slice_characters)
        assert not has_more_values(text, there)
        assert not there or has_more_values(text, there - 1)


def test_a_text_full_of_commas_quotes_and_backslashes_is_taken() -> None:
    text = ',[{"\\' * (VALUES_MAX // 2)
    assert parse_json(json.dumps({"inputs": text}).encode()) == {"inputs": text}


@pytest.mark.parametrize("one", ["[]", "7", "{}", '","', '"\\\\"', '"\\""'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-le"])
def test_too_many_values_are_refused_unread(one: str, encoding: str) -> None:
    raw = ("[" + ",".join([one] * (VALUES_MAX + 1)) + "]").encode(encoding)
    with pytest.raises(Refusal) as refused:
        parse_json(raw)
    fault = refused.value.faults[0]
    assert (fault.code, refused.value.status) == ("request_too_large", 413)
    assert fault.found
    assert fault.expected
    assert fault.fix


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_ordinary_bodies_are_read_as_the_library_reads_them(encoding: str) -> None:
    raw = '{"inputs": ["grün", 1.5, null, "\\ud83d\\ude00"], "a": {}}'.encode(encoding)
    assert parse_json(raw) == json.loads(raw)


@pytest.mark.parametrize("model", [PredictRequest, GenerateRequestBody])
def test_a_large_body_is_read_and_checked_in_a_thread(
    model: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def noted(name: str) -> None:
        call = getattr(bodies, name)

        def note(*given: Any) -> Any:
            seen.append((name, threading.get_ident()))
            return call(*given)

        monkeypatch.setattr(bodies, name, note)

    noted("_parse_body")
    noted("checked")
    here = threading.get_ident()
    for size, at_once in ((10, True), (AT_ONCE_BYTES, False)):
        seen.clear()
        read = asyncio.run(read_json(sent(json.dumps({"inputs": "x" * size}).encode()), model))
        assert read == model(inputs="x" * size)
        assert [name for name, _ in seen] == ["_parse_body", "checked"]
        assert all((thread == here) is at_once for _, thread in seen)


def test_parameters_of_a_form_have_the_same_bound() -> None:
    text = "[" + "[]," * (VALUES_MAX + 1) + "[]]"
    part = "--b\r\nContent-Disposition: form-data; name="
    raw = f'{part}"inputs"; filename="a"\r\n\r\nx\r\n{part}"parameters"\r\n\r\n{text}\r\n--b--\r\n'
    call = sent(raw.encode(), "multipart/form-data; boundary=b")

    async def read() -> None:
        await posted(PredictRequest)(call)

    with pytest.raises(Refusal) as refused:
        asyncio.run(read())
    assert refused.value.code == "request_too_large"


@pytest.mark.parametrize("padding", [0, AT_ONCE_BYTES])
def test_what_is_no_json_is_told_in_the_same_words_whatever_its_size(padding: int) -> None:
    space = b" " * padding
    with pytest.raises(RequestValidationError) as error:
        asyncio.run(read_json(sent(space + b'{"inputs" 1}'), PredictRequest))
    (fault,) = error.value.errors()
    assert (fault["type"], fault["loc"]) == ("json_invalid", ("body", padding + 10))
    with pytest.raises(HTTPException) as unread:
        asyncio.run(read_json(sent(space + b'{"inputs": "\xff"}'), PredictRequest))
    assert unread.value.status_code == 400
    with pytest.raises(RequestValidationError):
        asyncio.run(read_json(sent(space + b'{"inputs": "x"}', "text/plain"), PredictRequest))


def test_of_very_many_unknown_fields_a_few_are_told() -> None:
    content = {"inputs": "x", **{f"a{number}": None for number in range(20_000)}}
    for body in (content, {"inputs": "x", "parameters": {**content}}):
        with pytest.raises(RequestValidationError) as error:
            asyncio.run(read_json(sent(json.dumps(body).encode()), PredictRequest))
        assert 1 < len(error.value.errors()) <= MAX_UNKNOWN + 1
    ignored = {"model": "base", "prompt": "x", **content}
    asyncio.run(read_json(sent(json.dumps(ignored).encode()), CompletionRequest))


@given(VALUES)
def test_an_answer_in_pieces_is_the_same_text(content: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "AT_ONCE_VALUES", 4)
        text = "".join(json_pieces(content))
    assert text == json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def test_a_large_answer_is_written_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def noted(content: Any) -> bytes:
        threads.append(threading.get_ident())
        return written(content)

    monkeypatch.setattr("server.edge.endpoints.answers.written", noted)
    monkeypatch.setattr("server.edge.endpoints.middleware.written", noted)
    service: Any = Threads()
    small, large = [[0.5] * 8], [[0.5] * 768] * 64
    for content in (small, large):
        answer = asyncio.run(json_response(service, content, {"X-Adapter": "a"}))
        assert json.loads(bytes(answer.body)) == content
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-adapter"] == "a"
    assert threads[0] == threading.get_ident()
    assert threads[1] != threading.get_ident()
    assert max(map(len, json_pieces(large))) < JSON_SLICE_CHARACTERS


@pytest.mark.parametrize("value", ["a" * 5000, ["b"] * 5000, [["c", 1.5]] * 5000, 7, "short", [1]])
def test_a_fault_shows_the_start_of_a_value(value: object) -> None:
    assert SHORT_REPR.repr(value)[:120] == repr(value)[:120]
