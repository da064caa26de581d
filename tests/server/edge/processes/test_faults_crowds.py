"""A wall clock that jumps, a worker that stutters, and clients that leave by the hundred.

In the real processes, around an engine without a model.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.stand.fake_engine import SLOW_SEED
from tests.stand.live import ON_CLUSTER, Live, fake, of_one_machine
from tests.stand.shifted_clock import shift
from tests.stand.waits import until

pytestmark = pytest.mark.http

ROOT = Path(__file__).parents[4]
DAY_S = 86400.0
# All must be there before the first, which take half a minute, end; a cluster takes them up slower.
CROWD = 90 if ON_CLUSTER else 300
# What these tell the time for is for people: when something was made, started or last used.
WALL_CLOCK = frozenset(
    {
        "server/edge/admit/key_file.py",  # when a key ends
        "server/edge/admit/key_usage_file.py",  # of which day
        "server/edge/service.py",
        "server/edge/endpoints/openai.py",
        "server/edge/endpoints/ranking.py",
        "server/edge/endpoints/responses.py",
        "server/edge/litserve/loop.py",
        "server/edge/processes/start.py",
        "server/engine/snapshot.py",
        "server/metrics.py",
    }
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with fake(tmp_path_factory.mktemp("crowds") / "data", anew=True) as server:
        yield server


def generate(
    live: Live, tokens: int, *, seed: int | None = None, timeout_s: float = 120.0
) -> httpx2.Response:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": tokens, "seed": seed}}
    headers = {"X-Timeout-Seconds": str(timeout_s)}
    return live.client.post("/generate?adapter=story", json=body, headers=headers)


def predict(live: Live) -> httpx2.Response:
    return live.client.post("/predict?adapter=imdb", json={"inputs": "hello"})


def admitted(live: Live) -> float:
    return live.metric('hira_admitted{kind="requests"}')


def wait_until(what: str, live: Live, value: float, within_s: float = 120.0) -> None:
    until = time.monotonic() + within_s
    while live.metric(what) != value:
        assert time.monotonic() < until, f"{what} is {live.metric(what)}"
        time.sleep(0.02)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_clock_that_jumps_neither_ends_nor_extends_a_request(live: Live, jump_s: float) -> None:
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(generate, live, 30, seed=SLOW_SEED)
            wait_until('hira_admitted{kind="requests"}', live, 1)
            shift(live.folder, jump_s)
            assert live.client.get("/health/ready").status_code == 200, "the worker seems silent"
            assert running.result().status_code == 200
        began = time.monotonic()
        late = generate(live, 250, seed=SLOW_SEED, timeout_s=0.4)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began > 0.3
        assert predict(live).status_code == 200
        age = time.time() + jump_s - live.client.get("/v1/models").json()["data"][0]["created"]
        assert abs(age - jump_s) < DAY_S / 2, "what people see is wall time"
    finally:
        shift(live.folder, 0.0)


def test_only_what_people_read_is_told_by_the_wall_clock() -> None:
    found = set()
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time":
                found.add(path.relative_to(ROOT).as_posix())
    assert found <= WALL_CLOCK, "deadlines, ages and waits are counted by time.monotonic()"


@of_one_machine("its only worker stutters, and a cluster has others")
def test_stuttering_worker_answers_late_and_right(live: Live) -> None:
    pid, over = live.worker_pid, threading.Event()

    def stutter() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.25)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: predict(live), range(64)))
            texts = list(pool.map(lambda _: generate(live, 5), range(8)))
    finally:
        over.set()
        thread.join()
    assert {one.status_code for one in (*answers, *texts)} == {200}
    assert {one.json()[0]["label"] for one in answers} == {"imdb"}
    whole = "".join(f" story{number}" for number in range(5))
    assert {one.json()["generated_text"] for one in texts} == {whole}
    assert live.worker_pid == pid


def test_hundreds_who_leave_at_once_leave_nothing_behind(live: Live) -> None:
    place = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
    parameters = {"max_new_tokens": 240, "seed": SLOW_SEED}  # half a minute, if nobody leaves
    body = json.dumps({"inputs": "hello", "parameters": parameters}).encode()
    head = (
        "POST /generate_stream?adapter=story HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    predict(live)
    engines = live.engine_pids()
    http = [one for one in live.processes() if one.pid not in engines]
    before = {one: descriptors(one) for one in http}
    gone = live.metric('hira_adapters{state="cancelled"}')
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(place)) for _ in range(CROWD)]
        for number, client in enumerate(crowd):
            # A third is in the middle of its body, the others in the middle of their answer.
            client.sendall(head + body if number % 3 else head + body[:20])
        wait_until('hira_admitted{kind="requests"}', live, CROWD * 2 // 3)
        assert predict(live).status_code == 200, "who stays is served meanwhile"
        for client in crowd:
            # Not a polite end: the kernel sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until('hira_admitted{kind="requests"}', live, 0)
    # Those who left in the tests before may be told of later.
    left = gone + CROWD * 2 // 3
    until(lambda: live.metric('hira_adapters{state="cancelled"}') >= left, every_s=0.05)
    assert predict(live).status_code == 200
    until(
        lambda: sum(max(0, descriptors(one) - before[one]) for one in http) <= 8,
        "descriptors of clients that left are still open",
        every_s=0.1,
    )


def descriptors(one: psutil.Process) -> int:
    """How many a process has open; none where it has ended, as proxies do that are replaced."""
    with suppress(psutil.NoSuchProcess):
        return int(one.num_fds())
    return 0
