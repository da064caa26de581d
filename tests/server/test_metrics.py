"""Metrics: right across processes, bounded in labels, nothing left of dead processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.metrics import (
    BASE_LABEL,
    OTHER_LABEL,
    AdapterLabels,
    HttpMetrics,
    Live,
    WorkerMetrics,
    prepare,
    resident_bytes,
)

ROOT = Path(__file__).parents[2]


def shown(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_adapter_labels_are_bounded() -> None:
    labels = AdapterLabels(most=3)
    assert [labels.of(name) for name in ("a", "b", "c", "d", "a", None)] == [
        "a",
        "b",
        "c",
        OTHER_LABEL,
        "a",
        BASE_LABEL,
    ]


def test_http_metrics_have_the_names_that_dashboards_use() -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    metrics.request("/predict", "imdb", 200, 0.01)
    metrics.request("/predict", None, 200, 0.01)
    metrics.request("/nowhere", "", 404, 0.01)
    metrics.tokens("imdb", prompt=7, generated=0)
    metrics.tokens("imdb", prompt=3, generated=5)
    metrics.first_token("imdb", 0.1)
    metrics.next_token("imdb", 0.01)
    metrics.failure("imdb", "worker_lost")
    text = shown(registry)
    for line in (
        'hira_requests_total{adapter="imdb",endpoint="/predict",status="200"} 1.0',
        'hira_requests_total{adapter="base",endpoint="/predict",status="200"} 1.0',
        'hira_requests_total{adapter="",endpoint="/nowhere",status="404"} 1.0',
        'hira_tokens_total{adapter="imdb",kind="prompt"} 10.0',
        'hira_tokens_total{adapter="imdb",kind="generated"} 5.0',
        'hira_request_seconds_count{adapter="imdb",endpoint="/predict"} 1.0',
        'hira_time_to_first_token_seconds_count{adapter="imdb"} 1.0',
        'hira_inter_token_seconds_count{adapter="imdb"} 1.0',
        'hira_failures_total{adapter="imdb",code="worker_lost"} 1.0',
    ):
        assert line in text


def test_worker_metrics_are_by_lane() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry).step("encode", rows=8, adapters=3, seconds=0.01)
    text = shown(registry)
    assert 'hira_batch_rows_sum{lane="encode"} 8.0' in text
    assert 'hira_batch_adapters_sum{lane="encode"} 3.0' in text
    assert 'hira_step_seconds_count{lane="encode"} 1.0' in text


def test_waits_and_loads_are_histograms() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.step("encode", rows=2, adapters=1, seconds=0.01, waits_s=(0.003, 0.3))
    metrics.step("encode", rows=2, adapters=1, seconds=0.01)
    metrics.loads([0.03, 7.0])
    text = shown(registry)
    for line in (
        'hira_queue_seconds_bucket{lane="encode",le="0.005"} 1.0',
        'hira_queue_seconds_bucket{lane="encode",le="0.2"} 1.0',
        'hira_queue_seconds_bucket{lane="encode",le="0.5"} 2.0',
        'hira_queue_seconds_count{lane="encode"} 2.0',
        'hira_adapter_load_seconds_bucket{le="0.05"} 1.0',
        'hira_adapter_load_seconds_bucket{le="5.0"} 1.0',
        "hira_adapter_load_seconds_sum 7.03",
    ):
        assert line in text


def test_what_runs_and_how_many_adapters_are_registered_is_shown_where_it_is_known() -> None:
    registry = CollectorRegistry()
    build = {"version": "1.2.3", "base": "some/base"}
    registry.register(Live(registered=0, build=build))
    text = shown(registry)
    assert 'hira_build_info{base="some/base",version="1.2.3"} 1.0' in text
    assert "hira_registered_adapters 0.0" in text
    unknown = CollectorRegistry()
    unknown.register(Live())
    assert "hira_build_info" not in shown(unknown)
    assert "hira_registered_adapters" not in shown(unknown)


def test_live_gauges_show_this_moment() -> None:
    registry = CollectorRegistry()
    live = Live(
        {
            "queue_depth": {"encode": 2},
            "base_bytes": {"linear": 10, "other": 5},
            "kernel": "avx2",
            "totals": {},
            "generate_tokens": {"chosen": 3, "shared": 48},
        },
        processes={"main": os.getpid(), "gone": 2**22 + 1},
        worker_ready=True,
    )
    registry.register(live)
    text = shown(registry)
    assert 'hira_base_bytes{part="linear"} 10.0' in text
    assert 'hira_queue_depth{lane="encode"} 2.0' in text
    assert 'hira_kernel{kernel="avx2"} 1.0' in text
    assert 'hira_generate_tokens_total{kind="shared"} 48.0' in text
    assert "hira_residency" not in text
    assert 'hira_process_resident_bytes{role="main"}' in text
    assert "gone" not in text
    assert "hira_worker_ready 1.0" in text


def test_memory_of_static_steps_and_why_steps_were_not_are_shown() -> None:
    registry = CollectorRegistry()
    said = {
        "static_bytes": {"buffers": 5, "graphs": 7},
        "generate_steps": {"static": 3, "rank": 2},
        "encode_steps": {"unpadded": 4, "storage": 1},
        "paced_steps": {"all": 9, "light": 4},
    }
    registry.register(Live(said))
    value = registry.get_sample_value
    for part, nbytes in said["static_bytes"].items():
        assert value("hira_static_step_bytes", {"part": part}) == nbytes
    for lane in ("generate", "encode"):
        for how, steps in said[f"{lane}_steps"].items():
            assert value(f"hira_{lane}_steps_total", {"how": how}) == steps
    for whose, steps in said["paced_steps"].items():
        assert value("hira_paced_steps_total", {"of": whose}) == steps


def test_resident_bytes_of_this_process_are_plausible() -> None:
    assert resident_bytes({"me": os.getpid()})["me"] > 1 << 20


def test_preparing_too_late_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before"):
        prepare(tmp_path / "metrics")


MANY_PROCESSES = """
import os, sys
from pathlib import Path
from server import metrics
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "counter_1.db").write_text("left over")
metrics.prepare(folder)
children = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        metrics.count_as(f"http-{number}")
        here = metrics.HttpMetrics()
        for _ in range(5):
            here.request("/predict", "imdb", 200, 0.01)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
body, kind = metrics.exposition(metrics.Live(), "")
print(kind)
print(body.decode())
"""


def test_counts_of_all_processes_are_summed_and_left_overs_removed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY_PROCESSES, str(tmp_path / "metrics")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    line = 'hira_requests_total{adapter="imdb",endpoint="/predict",status="200"} 15.0'
    assert line in done.stdout
    assert done.stdout.startswith("text/plain")


CRASHES = """
import os, sys
from pathlib import Path
from server import metrics
folder = Path(sys.argv[1])
metrics.prepare(folder)
for crash in range(4):
    pid = os.fork()
    if pid == 0:
        metrics.count_as("http-0")
        here = metrics.HttpMetrics()
        here._labels._most = 2
        here.request("/predict", "imdb", 200, 0.01)
        here.request("/predict", f"name-{crash}", 200, 0.01)
        os._exit(1)
    os.waitpid(pid, 0)
    body, _ = metrics.exposition(metrics.Live(), "")
    print([one for one in body.decode().splitlines() if one.startswith("hira_requests_total")])
print(sorted(one.name for one in folder.iterdir()))
"""


def test_successor_of_a_dead_process_counts_on_in_its_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path / "metrics")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *scrapes, files = done.stdout.splitlines()
    for crash, lines in enumerate(scrapes, 1):
        assert f'adapter="imdb",endpoint="/predict",status="200"}} {crash}.0' in lines
    assert files == "['counter_http-0.db', 'gauge_max_http-0.db', 'histogram_http-0.db']"
    assert 'adapter="name-0"' in scrapes[-1]
    assert 'adapter="name-1"' not in scrapes[-1], "the bound is of all that have been one role"
    assert 'adapter="_other",endpoint="/predict",status="200"} 3.0' in scrapes[-1]


REPLACED = """
import shutil, sys
from pathlib import Path
from server import metrics
metrics.FOLDER_CHECKED_EVERY_S = 0.0
folder = Path(sys.argv[1])
metrics.prepare(folder)
metrics.count_as("http-0")
here = metrics.HttpMetrics()

def count(times):
    for _ in range(times):
        here.request("/predict", "imdb", 200, 0.01)

count(5)
folder.rename(folder.with_name("aside"))
count(1)
folder.mkdir()
count(3)
body, _ = metrics.exposition(metrics.Live(), "")
print(body.decode())
"""


def test_counts_go_on_in_a_folder_that_was_made_anew(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPLACED, str(tmp_path / "metrics")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    line = 'hira_requests_total{adapter="imdb",endpoint="/predict",status="200"} 3.0'
    assert line in done.stdout
