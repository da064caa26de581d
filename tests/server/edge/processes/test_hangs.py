"""Processes that live and do nothing: noticed, told of, and replaced."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.stand.fake_calls import predict
from tests.stand.fake_engine import SLOW_SEED
from tests.stand.fake_server import BROKEN_BEAT, HANGING, HUNG_CHORE
from tests.stand.live import Live, fake, of_one_machine
from tests.stand.waits import until

pytestmark = [
    pytest.mark.http,
    of_one_machine("its main process watches the others; in a cluster Ray Serve does"),
]

HANG_S = 10.0  # long after a silent worker is told of, however slow the machine
PATIENCE_S = 120.0  # for what must come to pass, but not by when


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("hangs") / "data"
    with fake(folder, hang_s=HANG_S, max_step_s=3, api_processes=2) as server:
        yield server


def test_stopped_worker_is_noticed_killed_and_replaced(live: Live) -> None:
    pid = live.worker_pid
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(generate_slowly, live) for _ in range(4)]
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 4)
        os.kill(pid, signal.SIGSTOP)
        # Before it is killed, new requests are refused rather than kept waiting.
        until(lambda: refused(live))
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        assert live.client.get("/health/ready").json()["status"] == "worker_silent"
        answers = [one.result() for one in running]
        assert {one.json()["code"] for one in answers} == {"worker_lost"}
    live.wait_ready()
    assert live.worker_pid != pid
    assert predict(live).status_code == 200
    assert "no sign of life" in live.log.read_text()


def generate_slowly(live: Live) -> httpx2.Response:
    """Not over before the worker is stopped, however late that is."""
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 250, "seed": SLOW_SEED}}
    return live.client.post("/generate?adapter=story", json=body)


def refused(live: Live) -> bool:
    """Whether a request is refused because the worker is silent."""
    answer = live.client.post(
        "/predict?adapter=imdb", json={"inputs": "x"}, headers={"X-Timeout-Seconds": "0.2"}
    )
    return answer.status_code == 503 and bool(answer.json()["code"] == "worker_silent")


def test_step_that_never_ends_costs_its_worker(live: Live) -> None:
    pid = live.worker_pid
    answer = predict(live, top_k=502)
    assert (answer.status_code, answer.json()["code"]) == (503, "worker_lost")
    live.wait_ready()
    assert live.worker_pid != pid
    assert "one step has taken" in live.log.read_text()
    assert predict(live).status_code == 200


def accepting(main: psutil.Process) -> list[psutil.Process]:
    """Children that live and hold a socket."""
    found = []
    for child in main.children():
        with contextlib.suppress(psutil.Error):
            if child.net_connections(kind="tcp"):
                found.append(child)
    return found


def test_stopped_http_process_is_replaced(tmp_path: Path) -> None:
    with fake(tmp_path / "data", hang_s=6, api_processes=2) as live:
        main = psutil.Process(live.child.pid)
        holding = accepting(main)
        _, first, _ = sorted(holding, key=lambda one: one.create_time())
        first.suspend()
        suspended = first.pid
        until(lambda: suspended not in {one.pid for one in accepting(main)})
        until(lambda: len(accepting(main)) == len(holding))
        for _ in range(20):
            assert httpx2.get(f"{live.url}/health/live", timeout=60).status_code == 200
        assert "HTTP process 0: no sign of life" in live.log.read_text()


def test_http_process_that_loses_a_part_answers_all_and_is_replaced(tmp_path: Path) -> None:
    with fake(tmp_path / "data") as live, ThreadPoolExecutor(4) as pool:
        cancelled = 'hira_adapters{state="cancelled"}'
        running = [pool.submit(generate_slowly, live) for _ in range(3)]
        until(lambda: live.metric('hira_admitted{kind="requests"}') == 3)
        (live.folder / BROKEN_BEAT).touch()
        answers = [one.result() for one in running]
        assert {(one.status_code, one.json()["code"]) for one in answers} == {(503, "restarting")}
        live.wait_ready()
        # Their process is gone, and the worker has stopped what it did for it.
        until(lambda: live.metric(cancelled) == 3)
        assert predict(live).status_code == 200
        log = live.log.read_text()
        assert "asked for" in log, "why, with its traceback"
        assert "without its dispatcher-tick" in log


def test_chore_that_hangs_holds_up_neither_requests_nor_the_main_process(tmp_path: Path) -> None:
    with fake(tmp_path / "data") as live:
        order = live.folder / HUNG_CHORE
        order.touch()
        until(lambda: order.read_text() != "")
        assert int(order.read_text()) != live.child.pid
        pid = live.worker_pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: live.metric("hira_worker_ready") == 0)
        live.wait_ready()
        assert live.worker_pid != pid
        assert predict(live).status_code == 200


def test_text_on_which_the_tokenizer_hangs_costs_one_http_process(tmp_path: Path) -> None:
    with fake(tmp_path / "data", hang_s=6) as live:
        body = {"inputs": HANGING}
        first = live.client.post(
            "/predict?adapter=imdb", json=body, headers={"X-Timeout-Seconds": "1"}
        )
        assert (first.status_code, first.json()["code"]) == (504, "deadline_exceeded")
        # Who comes while it hangs is told at his deadline, or when the process ends.
        behind = live.client.post("/predict?adapter=imdb", json={"inputs": "x"})
        assert (behind.status_code, behind.json()["code"]) == (503, "restarting")
        assert int(behind.headers["Retry-After"]) >= 1
        live.wait_ready()
        assert predict(live).status_code == 200
        assert "ends without its short-texts" in live.log.read_text()


def test_crash_loop_backs_off_and_says_so(live: Live) -> None:
    for _ in range(3):
        answer = predict(live, top_k=666)
        assert answer.json()["code"] == "worker_lost"
        live.wait_ready()
    pauses = re.findall(r"killed by SIGKILL.*starts in ([\d.]+) s", live.log.read_text())
    assert len(pauses) == 3
    assert float(pauses[0]) < float(pauses[1]) < float(pauses[2])
