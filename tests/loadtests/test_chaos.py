"""The chaos run judges rightly, and some seconds of it find nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtests.chaos.operators import Content, fault_in
from loadtests.chaos.windows import AFTER_S, Window, Windows
from loadtests.connection import Reply

ROOT = Path(__file__).parents[2]
CONTENT = Content(b"", "v1", {"a text": {"LOW": 0.25, "HIGH": 0.75}})


def reply(low: float, high: float) -> Reply:
    rows = [{"label": "LOW", "score": low}, {"label": "HIGH", "score": high}]
    return Reply(200, body=json.dumps(rows).encode())


def test_an_answer_that_is_off_is_a_fault_and_a_close_one_is_none() -> None:
    assert fault_in(reply(0.2501, 0.7499), CONTENT, "a text", 1e-3) is None
    assert "off by 0.1" in (fault_in(reply(0.35, 0.65), CONTENT, "a text", 1e-3) or "")
    assert fault_in(reply(float("nan"), 0.75), CONTENT, "a text", 1e-3) is not None


def test_a_break_excuses_only_what_overlaps_it() -> None:
    windows = Windows([Window("kill_worker", 100.0, 110.0), Window("fill_disk", 200.0)])
    assert windows.cover(90.0, 99.0) is None
    assert windows.cover(99.0, 101.0) == "kill_worker"
    assert windows.cover(110.0 + AFTER_S / 2, 150.0) == "kill_worker"
    assert windows.cover(111.0 + AFTER_S, 150.0) is None
    assert windows.cover(500.0, 501.0) == "fill_disk"  # it lasts
    with windows.during("lock_database"):
        now = time.monotonic()
        assert windows.cover(now, now) == "lock_database"


@pytest.mark.http
def test_some_seconds_of_chaos_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.chaos", "--rounds=1", "--apart-s=2"]
    command += ["--variants=4", "--processes=1", "--only=damage_store", "--only=kill_worker"]
    ran = subprocess.run(
        [*command, f"--results={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["right"] > 0
    assert {"damage_store", "kill_worker"} <= report["breaks"].keys()
