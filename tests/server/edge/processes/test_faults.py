"""What LitServe leaves open, closed: deaths, signals, limits, clients that leave.

In the real processes, around an engine without a model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.stand.fake_engine import SLOW_SEED
from tests.stand.live import END_S, START_S, Live, fake, of_one_machine
from tests.stand.waits import until

pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("faults") / "data"
    with fake(folder, api_processes=2, max_body_bytes=4096) as server:
        yield server


def predict(live: Live, **parameters: Any) -> httpx2.Response:
    return live.client.post(
        "/predict?adapter=imdb", json={"inputs": "hello", "parameters": parameters}
    )


def generate(live: Live, tokens: int, seed: int | None = None, **more: Any) -> httpx2.Response:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": tokens, "seed": seed}}
    return live.client.post("/generate?adapter=story", json=body, **more)


@of_one_machine("its only worker is killed, and a cluster has others")
def test_killed_worker_fails_its_requests_at_once_and_comes_back(live: Live) -> None:
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(generate, live, 200, SLOW_SEED) for _ in range(8)]
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 8)
        killed = time.monotonic()
        os.kill(live.worker_pid, signal.SIGKILL)
        answers = [one.result() for one in running]
        assert time.monotonic() - killed < 15.0  # what they asked for would take longer
    assert {one.status_code for one in answers} == {503}
    assert {one.json()["code"] for one in answers} == {"worker_lost"}
    live.wait_ready()
    assert predict(live).json()[0]["label"] == "imdb"


@of_one_machine("its only worker is killed, and a cluster has others")
def test_killed_worker_ends_a_stream_with_an_error_event(live: Live) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 200}}
    with live.client.stream("POST", "/generate_stream?adapter=story", json=body) as stream:
        lines = stream.iter_lines()
        first = json.loads(next(lines).removeprefix("data:"))
        assert first["token"]["text"] == " story0"
        os.kill(live.worker_pid, signal.SIGKILL)
        events = [json.loads(line.removeprefix("data:")) for line in lines if line]
    assert events[-1]["code"] == "worker_lost"
    live.wait_ready()
    chat = {"model": "story", "prompt": "hello", "max_tokens": 200, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=chat) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(live.worker_pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data:"))["error"]["code"] == "worker_lost"
    live.wait_ready()


def test_broken_engine_ends_its_worker_and_not_the_server(live: Live) -> None:
    answer = predict(live, top_k=501)
    assert (answer.status_code, answer.json()["code"]) == (503, "worker_lost")
    until(lambda: predict(live).status_code == 200, within_s=START_S)


def test_failure_of_one_request_is_its_own(live: Live) -> None:
    answer = predict(live, top_k=500)
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert predict(live).status_code == 200


@of_one_machine("its HTTP processes share a socket")
def test_killed_http_process_is_replaced(live: Live) -> None:
    main = psutil.Process(live.child.pid)
    before = {one.pid for one in main.children()}
    # The process of the queues is forked first and holds the socket too.
    holding = [one for one in main.children() if one.net_connections(kind="tcp")]
    queues, first, second = sorted(holding, key=lambda one: one.create_time())
    assert queues.pid < first.pid < second.pid
    first.kill()
    until(lambda: {one.pid for one in main.children()} - before)
    live.client.close()
    live.client = httpx2.Client(base_url=live.url, timeout=60)
    live.wait_ready()
    for _ in range(20):
        assert httpx2.get(f"{live.url}/health/ready").status_code == 200
    # Both answer, the new one from its first request on.
    with ThreadPoolExecutor(8) as pool:
        assert {one.status_code for one in pool.map(lambda _: predict(live), range(200))} == {200}
    # Both give way to the worker.
    worker = psutil.Process(live.worker_pid).nice()
    http = [one for one in main.children() if one.net_connections(kind="tcp") and one != queues]
    assert [one.nice() for one in http] == [min(19, worker + 5)] * 2


def test_client_that_leaves_stops_the_work(live: Live) -> None:
    def cancelled() -> float:
        return live.metric('hira_adapters{state="cancelled"}')

    before = cancelled()
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 250, "seed": SLOW_SEED}}
    text = json.dumps(body)
    place = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
    with socket.create_connection(place) as one:
        one.sendall(
            "POST /generate?adapter=story HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
            f"\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
        )
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 1)
    with live.client.stream("POST", "/generate_stream?adapter=story", json=body) as stream:
        next(stream.iter_lines())
    until(lambda: cancelled() == before + 2)
    assert live.metric('hira_admitted{kind="requests"}') == 0


def test_deadline_of_the_header_is_kept(live: Live) -> None:
    began = time.monotonic()
    answer = generate(live, 250, SLOW_SEED, headers={"X-Timeout-Seconds": "0.3"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 25  # the generation would take 30 s
    for wrong in ("soon", "-1", "1e9", "nan"):
        answer = generate(live, 2, headers={"X-Timeout-Seconds": wrong})
        assert answer.status_code == 422
        assert answer.json()["field"] == "X-Timeout-Seconds"


def test_large_bodies_are_refused_with_and_without_a_length(live: Live) -> None:
    text = json.dumps({"inputs": "x" * 5000}).encode()
    headers = {"Content-Type": "application/json"}
    answer = live.client.post("/predict?adapter=imdb", content=text, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    chunks = (text[at : at + 100] for at in range(0, len(text), 100))
    answer = live.client.post("/predict?adapter=imdb", content=chunks, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"inputs": "a"', "malformed_body"),
        (b'{"inputs": "\xff"}', "malformed_body"),
        (b"[" * 3000, "malformed_body"),
        (b"null", "invalid_request"),
        (b'{"inputs": 1}', "invalid_request"),
        (b'{"inputs": []}', "invalid_request"),
        (b'{"inputs": ""}', "invalid_request"),
    ],
)
def test_malformed_bodies_have_defined_answers(live: Live, raw: bytes, code: str) -> None:
    answer = live.client.post(
        "/predict?adapter=imdb", content=raw, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_request_id_is_taken_over_or_made(live: Live) -> None:
    given = live.client.get("/health/live", headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == "abc-1"
    made = live.client.get("/nowhere")
    assert made.headers["X-Request-Id"]
    assert made.headers["X-Content-Type-Options"] == "nosniff"


def test_request_id_that_is_none_is_replaced(live: Live) -> None:
    made = live.client.get("/nowhere", headers={"X-Request-Id": "no good"})
    assert re.fullmatch(r"[0-9a-f]{32}", made.headers["X-Request-Id"])


@of_one_machine("its only worker is stopped, and a cluster has others")
def test_stopped_worker_makes_requests_end_by_their_deadline(live: Live) -> None:
    pid = live.worker_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        answer = live.client.post(
            "/predict?adapter=imdb", json={"inputs": "x"}, headers={"X-Timeout-Seconds": "0.5"}
        )
        assert answer.status_code == 504
        until(lambda: live.client.get("/health/ready").status_code == 503)
        assert live.client.get("/health/ready").json()["status"] == "worker_silent"
    finally:
        os.kill(pid, signal.SIGCONT)
    live.wait_ready()


def test_overload_is_refused_with_a_time_to_return(tmp_path: Path) -> None:
    with (
        fake(tmp_path / "data", max_queue_requests=3) as live,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = [one.result() for one in [pool.submit(generate, live, 30) for _ in range(8)]]
        refused = [one for one in answers if one.status_code == 429]
        assert len(refused) == 5
        assert {one.json()["code"] for one in refused} == {"overloaded"}
        assert all(int(one.headers["Retry-After"]) >= 1 for one in refused)


def test_term_drains_then_ends_well_with_nothing_left(tmp_path: Path) -> None:
    with fake(tmp_path / "data", api_processes=2) as live:
        answers: list[httpx2.Response] = []
        client = threading.Thread(target=lambda: answers.append(generate(live, 60)))
        client.start()
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 1)
        live.processes()
        live.child.send_signal(signal.SIGTERM)
        until(lambda: live.client.get("/health/ready").status_code == 503)
        health = live.client.get("/health/ready").json()
        assert health["status"] == "draining"
        assert "stopping" in health["detail"]
        refused = predict(live)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        client.join()
        assert answers[0].status_code == 200
        assert live.child.wait(END_S) == 0
        until(lambda: live.left_over() == [])


@of_one_machine("its processes are one session; Ray's own end with a signal")
def test_term_to_all_processes_at_once_drains_too(tmp_path: Path) -> None:
    with fake(tmp_path / "data") as live, ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, live, 120)
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 1)
        live.processes()
        os.killpg(live.child.pid, signal.SIGTERM)
        assert running.result().status_code == 200
        assert live.child.wait(END_S) == 0
        until(lambda: live.left_over() == [])


@of_one_machine("a cluster reads its settings when it is deployed")
def test_hangup_reads_the_settings_again(tmp_path: Path) -> None:
    config = tmp_path / "hira.toml"
    config.write_text("max_inputs = 2\n")
    body = {"inputs": ["a", "b", "c"]}
    path = "/predict?adapter=imdb"
    with fake(tmp_path / "data", config=config, api_processes=2) as live:
        assert live.client.post(path, json=body).status_code == 422
        config.write_text('max_inputs = 3\n[api_keys]\napp = "a-new-key"\n')
        live.child.send_signal(signal.SIGHUP)
        until(lambda: live.client.post(path, json=body).status_code == 401)
        right = {"Authorization": "Bearer a-new-key"}
        for _ in range(10):
            assert httpx2.post(live.url + path, json=body, headers=right).status_code == 200
        config.write_text("nonsense = 1\n")
        live.child.send_signal(signal.SIGHUP)
        until(lambda: "nonsense" in live.log.read_text())
        assert httpx2.post(live.url + path, json=body, headers=right).status_code == 200


def test_drain_has_a_bound(tmp_path: Path) -> None:
    with fake(tmp_path / "data", drain_s=0.5) as live:
        answers: list[httpx2.Response] = []
        client = threading.Thread(target=lambda: answers.append(generate(live, 250, SLOW_SEED)))
        client.start()
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 1)
        began = time.monotonic()
        assert live.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 25  # the generation alone would take 30 s
        client.join()
        assert (answers[0].status_code, answers[0].json()["code"]) == (503, "draining")
        until(lambda: live.left_over() == [])


@pytest.mark.parametrize("build", ["build", "build_deaf"])
def test_work_that_outlives_the_drain_is_dropped_and_not_killed(tmp_path: Path, build: str) -> None:
    engine = f"tests.stand.fake_engine:{build}"
    with fake(tmp_path / "data", engine, drain_s=0.5, api_processes=4) as live:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 250, "seed": SLOW_SEED}}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(live.client.post, "/generate?adapter=story", json=body)
            until(lambda: live.metric('hira_admitted{kind="requests"}') == 1)
            began = time.monotonic()
            assert live.end() == 0
            assert time.monotonic() - began < 25  # one generation alone would take 30 s
            assert running.result().json()["code"] == "draining"
        log = live.log.read_text()
        assert "SIGKILL" not in log
        assert "Forcibly" not in log
        until(lambda: live.left_over() == [])


@of_one_machine("its processes end with the main one; Ray has its own way")
def test_killed_main_process_leaves_no_orphans(tmp_path: Path) -> None:
    with fake(tmp_path / "data", api_processes=2) as live:
        assert len(live.processes()) >= 5
        live.child.kill()
        live.child.wait()
        until(lambda: live.left_over() == [])


@of_one_machine("Ray starts a replica several times and logs each failure")
def test_worker_that_cannot_be_set_up_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with fake(tmp_path / "data", "tests.stand.fake_engine:build_broken", wait=False) as live:
        assert live.child.wait(START_S) == 1
        text = live.log.read_text()
        assert "hira: ValueError: no such base in two lines" in text
        assert "Traceback" not in text
        until(lambda: live.left_over() == [])


def test_slow_client_holds_nobody_up(live: Live) -> None:
    place = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
    with ExitStack() as stack:
        for _ in range(50):
            slow = stack.enter_context(socket.create_connection(place))
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert predict(live).status_code == 200
