"""Limits of a connection, through real sockets: what is too much, too slow, or never read."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx2
import pytest

from tests.stand.live import ON_CLUSTER, Live, fake, of_one_machine

pytestmark = pytest.mark.http

PATIENCE_S = 1.0
LATE_S = 30.0  # that a busy machine may be late by
CONNECTIONS = 40
HEAD_BYTES = 4096


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("connections") / "data"
    with fake(
        folder,
        client_timeout_s=PATIENCE_S,
        max_connections=CONNECTIONS,
        max_header_bytes=HEAD_BYTES,
    ) as server:
        yield server


def place(live: Live) -> tuple[str, int]:
    return "127.0.0.1", int(live.url.rsplit(":", 1)[1])


def connect(live: Live) -> socket.socket:
    return socket.create_connection(place(live), timeout=60)


def read_all(one: socket.socket) -> bytes:
    """Everything until the server closes."""
    found = b""
    try:
        while piece := one.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def read_answer(one: socket.socket) -> bytes:
    """One answer, whether the server closes then or not; it must give its length."""
    found = b""
    while b"\r\n\r\n" not in found and (piece := one.recv(65536)):
        found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"content-length: (\d+)", head.lower())
    while len(body) < int(length) and (piece := one.recv(65536)):
        body += piece
    return head + b"\r\n\r\n" + body


def answer(raw: bytes) -> tuple[int, Any]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body) if body else None


def refused(live: Live, code: str) -> float:
    return live.metric(f'hira_refusals_total{{code="{code}"}}')


def exchanged(live: Live, raw: bytes) -> tuple[int, Any]:
    """Send bytes and wait for the answer and the end of the connection."""
    with connect(live) as one:
        one.sendall(raw)
        return answer(read_all(one))


def posted(body: bytes, *headers: bytes) -> bytes:
    lines = [
        b"POST /predict?adapter=imdb HTTP/1.1",
        b"Host: x",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


BODY = json.dumps({"inputs": "hello"}).encode()


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_head_that_is_too_large_is_refused_whole_or_in_pieces(live: Live) -> None:
    before = refused(live, "head_too_large")
    whole = posted(BODY, b"X-Long: " + b"x" * HEAD_BYTES)
    status, problem = exchanged(live, whole)
    assert (status, problem["code"]) == (431, "head_too_large")
    with connect(live) as one:  # endless: no end of the head ever comes
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
        sent = 0
        try:
            while sent < 64 * HEAD_BYTES:
                one.sendall(b"x" * 512)
                sent += 512
                time.sleep(0.001)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 64 * HEAD_BYTES
    assert refused(live, "head_too_large") == before + 2


CHUNKED = b"POST /predict?adapter=imdb HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
CHUNKED += b"Content-Type: application/json\r\n\r\n"


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
@pytest.mark.parametrize("trailer", [b"x" * 512, b"X-A: " + b"x" * 505 + b"\r\n"])
def test_endless_trailers_end_the_connection(live: Live, trailer: bytes) -> None:
    before = refused(live, "head_too_large")
    with connect(live) as one:
        one.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\nX-Long: " % (len(BODY), BODY))
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 16 * HEAD_BYTES:
                one.sendall(trailer)
                sent += len(trailer)
                time.sleep(0.001)
        assert sent < 16 * HEAD_BYTES
    assert refused(live, "head_too_large") == before + 1


def test_trailers_are_no_headers_and_many_small_chunks_are_a_body(live: Live) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * HEAD_BYTES + BODY)
    with connect(live) as one:
        one.sendall(CHUNKED + chunks[:9])
        time.sleep(0.05)
        one.sendall(chunks[9:] + b"0\r\nX-Timeout-Seconds: none\r\n\r\n")
        status = int(one.recv(65536).split(b" ")[1])
    assert status == 200


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_too_many_headers_are_refused(live: Live) -> None:
    status, problem = exchanged(live, posted(BODY, *(b"X-%d: 1" % i for i in range(100))))
    assert (status, problem["code"]) == (431, "head_too_large")
    assert problem["found"] == "103 headers"


def test_long_query_is_refused(live: Live) -> None:
    answered = live.client.post("/predict?adapter=" + "a" * 3000, json={"inputs": "x"})
    assert answered.status_code == 422  # a name of that length is none
    with fake(live.folder.parent / "wide", max_header_bytes=65536) as wide:
        long = wide.client.post("/predict?adapter=imdb&x=" + "a" * 5000, json={"inputs": "x"})
        assert (long.status_code, long.json()["code"]) == (422, "invalid_request")
        assert long.json()["expected"] == "at most 4096"


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_head_that_comes_too_slowly_is_given_up(live: Live) -> None:
    before = refused(live, "head_too_slow")
    began = time.monotonic()
    with connect(live) as one:
        one.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        one.settimeout(0.1)
        found = b""
        while time.monotonic() - began < LATE_S:  # a byte now and then keeps nothing alive
            try:
                one.sendall(b"X")
                found = one.recv(65536)
                break
            except TimeoutError:
                continue
        assert (answer(found)[0], answer(found)[1]["code"]) == (408, "head_too_slow")
    assert PATIENCE_S - 0.1 <= time.monotonic() - began < PATIENCE_S + LATE_S
    assert refused(live, "head_too_slow") == before + 1


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
@pytest.mark.parametrize(
    ("said", "status"),
    [(b"", None), (b"\r\n", 408), (posted(BODY), 200), (posted(BODY) + b"G", 200)],
)
def test_connection_that_is_idle_is_closed(live: Live, said: bytes, status: int | None) -> None:
    with connect(live) as one:
        began = time.monotonic()
        one.sendall(said)
        found = read_all(one)
        assert PATIENCE_S - 0.1 <= time.monotonic() - began < PATIENCE_S + LATE_S
        assert found == b"" if status is None else found.startswith(b"HTTP/1.1 %d" % status)


def test_connection_in_use_outlives_the_time_for_idle_ones(live: Live) -> None:
    with connect(live) as one:
        for _ in range(5):
            one.sendall(posted(BODY))
            found = b""
            while not found.endswith(b"}]") and (piece := one.recv(65536)):
                found += piece
            assert found.startswith(b"HTTP/1.1 200")
            time.sleep(0.3 * PATIENCE_S)


def test_body_that_comes_too_slowly_is_given_up(live: Live) -> None:
    with connect(live) as one:
        one.sendall(posted(BODY)[:-3])
        began = time.monotonic()
        status, problem = answer(read_answer(one))
        assert (status, problem["code"]) == (408, "body_too_slow")
        assert time.monotonic() - began < PATIENCE_S + LATE_S
        if not ON_CLUSTER:  # whose proxy has the connection, and waits for the rest
            assert read_all(one) == b""


def test_the_deadline_counts_from_the_arrival_of_the_head(live: Live) -> None:
    raw = posted(BODY, b"X-Timeout-Seconds: 0.3", b"Connection: close")
    with connect(live) as one:
        one.sendall(raw[: -len(BODY)])
        time.sleep(0.6)
        one.sendall(BODY)
        status, problem = answer(read_all(one))
    assert (status, problem["code"]) == (504, "deadline_exceeded")


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_what_is_not_http_has_a_typed_answer(live: Live) -> None:
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
    ):
        status, problem = exchanged(live, raw)
        assert (status, problem["code"]) == (400, "malformed_request")
    log = live.log.read_text()
    assert "Invalid HTTP request" not in log


@of_one_machine("the HTTP server that Ray Serve starts speaks WebSocket")
def test_other_protocols_are_not_spoken(live: Live) -> None:
    upgrade = [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"]
    with connect(live) as one:
        one.sendall(posted(BODY, *upgrade, b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="))
        assert b" 101 " not in one.recv(65536)
    assert "websocket" not in live.log.read_text().lower()


def test_requests_sent_ahead_are_answered_in_turn(live: Live) -> None:
    with connect(live) as one:
        one.sendall(posted(BODY) * 20)
        found = b""
        while found.count(b"HTTP/1.1 200") < 20:
            piece = one.recv(65536)
            assert piece
            found += piece


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_client_that_does_not_read_is_read_from_no_more_and_loses_its_connection(
    live: Live,
) -> None:
    texts = [f"{number:05d}" + "x" * 200 for number in range(256)]
    large = posted(json.dumps({"inputs": texts}).encode())
    most = 64 << 20  # far more than the sockets' buffers hold, either way
    sent = 0
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(place(live))
        one.settimeout(60)
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < most:
                one.sendall(large)
                sent += len(large)
    assert sent < most
    assert live.client.get("/health/ready").status_code == 200


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_connections_beyond_the_most_push_out_the_idle_ones(live: Live) -> None:
    with ExitStack() as stack:
        # Hold as many connections as there may be, none of them with a request.
        held = [stack.enter_context(connect(live)) for _ in range(CONNECTIONS + 5)]
        with connect(live) as one:
            one.sendall(posted(BODY))
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        held[0].settimeout(LATE_S)
        assert read_all(held[0]) == b""  # the one that waited longest had to go


@of_one_machine("Ray Serve's proxy has the connections and its own limits of them")
def test_connections_beyond_the_most_are_refused_when_all_are_busy(live: Live) -> None:
    before = refused(live, "too_many_connections")
    body = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": 200}}).encode()
    head = b"POST /generate?adapter=story HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            busy = stack.enter_context(connect(live))
            busy.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until = time.monotonic() + 60
        status = 200
        while status != 503 and time.monotonic() < until:
            with connect(live) as one:
                one.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                found = one.recv(65536)
                status = int(found.split(b" ")[1])
        assert (status, answer(found)[1]["code"]) == (503, "too_many_connections")
        assert b"retry-after: 1" in found
    live.client.close()
    live.client = httpx2.Client(base_url=live.url, timeout=60)
    live.wait_ready()
    assert refused(live, "too_many_connections") > before


def test_request_without_a_key_is_refused_before_its_body_is_read(live: Live) -> None:
    with connect(live) as one:
        one.sendall(
            b"POST /admin/adapters HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
        )
        found = b""  # no byte of the body is sent: who waits for it answers 408
        while b"key_missing" not in found:  # the body may come in a piece of its own
            piece = one.recv(65536)
            assert piece, found
            found += piece
        assert answer(found)[0] == 401


def test_connections_that_end_leave_nothing_behind(live: Live) -> None:
    import psutil

    def descriptors() -> int:
        return max(int(one.num_fds()) for one in live.processes())

    time.sleep(PATIENCE_S + 0.5)
    before = descriptors()
    for _ in range(5):
        with ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(connect(live)).sendall(posted(BODY)[:40])
    until = time.monotonic() + 60
    while descriptors() > before + 5 and time.monotonic() < until:
        time.sleep(0.1)
    assert descriptors() <= before + 5
    assert psutil.pid_exists(live.child.pid)
