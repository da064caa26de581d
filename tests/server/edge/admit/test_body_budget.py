"""Memory for bodies: what is held of them, counted exactly, and refused before it is read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.admit.admission import Admission
from server.edge.admit.body_budget import BodyBudget
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.errors import Refusal
from tests.stand.live import Live, fake

MOST = 2000
SENT = json.dumps({"inputs": "hello"}).encode()


def padded(size: int) -> bytes:
    return SENT + b" " * (size - len(SENT))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1500)), max_size=60))
def test_what_is_held_is_the_sum_and_only_a_lone_body_exceeds_the_bound(
    steps: list[tuple[int, int]],
) -> None:
    budget, admission = BodyBudget(), Admission(SharedLoad(1), Bounds(9, 9, 9), 1)
    bodies = [budget.hold() for _ in range(5)]
    sizes = [0] * 5
    for which, size in steps:
        if which == 5:
            bodies[size % 5].release()
            sizes[size % 5] = 0
            continue
        grown = max(size, sizes[which])
        others = sum(sizes) - sizes[which]
        if grown > sizes[which] and others and others + grown > 1000:
            with pytest.raises(Refusal, match="overloaded"):
                bodies[which].grow(size, 1000, admission)
        else:
            bodies[which].grow(size, 1000, admission)
            sizes[which] = grown
        assert budget.held_bytes == sum(sizes)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("bodies") / "data"
    with fake(folder, max_pending_body_bytes=MOST) as server:
        yield server


def begun(live: Live, size: int, sent: bytes) -> socket.socket:
    """A request that has stated its length and sent some of its body."""
    place = "127.0.0.1", int(live.url.rsplit(":", 1)[1])
    one = socket.create_connection(place, timeout=20)
    head = f"POST /predict?adapter=imdb HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
    one.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode())
    one.sendall(sent)
    time.sleep(0.2)
    return one


def status_of(one: socket.socket) -> int:
    return int(one.recv(65536).split(b" ")[1])


@pytest.mark.http
def test_a_body_is_refused_while_others_hold_the_memory(live: Live) -> None:
    headers = {"Content-Type": "application/json"}
    with begun(live, 1500, padded(1500)[:-100]) as first:
        with begun(live, 1500, b"") as second:  # refused before it is read
            assert status_of(second) == 429
        grows = (padded(1500)[i : i + 100] for i in range(0, 1500, 100))
        chunked = live.client.post("/predict?adapter=imdb", content=grows, headers=headers)
        assert (chunked.status_code, chunked.json()["code"]) == (429, "overloaded")
        assert "bytes of bodies" in chunked.json()["expected"]
        assert int(chunked.headers["Retry-After"]) >= 1
        fits = live.client.post("/predict?adapter=imdb", content=padded(400), headers=headers)
        assert fits.status_code == 200
        first.sendall(b" " * 100)
        assert status_of(first) == 200
    for _ in range(3):  # all is given back; and one that is alone may have more
        after = live.client.post("/predict?adapter=imdb", content=padded(3000), headers=headers)
        assert after.status_code == 200
