"""The churn run judges rightly, ends when it should, and a short one finds nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.churn import Quota, Tenant, Version, fault_in
from loadtests.connection import Reply

ROOT = Path(__file__).parents[2]
ANSWERS = {"a text": {"LOW": 0.25, "HIGH": 0.75}}
POOL = {digest: Version(digest, b"", ANSWERS) for digest in ("v1", "v2")}
TENANT = Tenant("one", POOL, ["v1", "v2"])


def reply(low: float, *, name: str = "one", version: str = "v2") -> Reply:
    rows = [{"label": "LOW", "score": low}, {"label": "HIGH", "score": 1.0 - low}]
    headers = {b"x-adapter": name.encode(), b"x-adapter-version": version.encode()}
    return Reply(200, headers, json.dumps(rows).encode())


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (reply(0.35), "off by 0.1"),
        (reply(math.nan), "off by nan"),
        (reply(0.25, name="two"), "answered by two"),
        (reply(0.25, version="v3"), "never uploaded"),
        (reply(0.25, version="v1"), "replaced before"),
    ],
)
def test_every_kind_of_wrong_answer_is_seen(answer: Reply, fault: str) -> None:
    assert fault in (fault_in(answer, TENANT, ["a text"], 1, 1e-3) or "")


def test_a_version_that_was_being_replaced_may_answer() -> None:
    assert fault_in(reply(0.2501), TENANT, ["a text"], 1, 1e-3) is None
    assert fault_in(reply(0.25, version="v1"), TENANT, ["a text"], 0, 1e-3) is None


def test_a_version_may_answer_for_the_bound_that_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("loadtests.churn.time.monotonic", lambda: now[0])
    tenant = Tenant("one", POOL, ["v1"])
    for position, digest in enumerate(("v2", "v1"), start=1):
        tenant.uploads.append(digest)
        now[0] += 10.0
        tenant.confirm(position)
    assert (tenant.oldest(0.0), tenant.oldest(1.0), tenant.oldest(15.0)) == (2, 1, 0)
    now[0] += 1.5
    assert tenant.oldest(1.0) == 2
    assert tenant.stale_s("v1", now[0]) == 0.0, "it is the present one"
    assert tenant.stale_s("v2", now[0]) == 1.5
    assert tenant.stale_s("v2", now[0] - 2.0) == 0.0


def test_a_quota_ends_by_number_or_by_time() -> None:
    quota = Quota(2, math.inf)
    found = []
    for compared in range(4):
        quota.compared = compared
        found.append(quota.is_open)
    assert found == [True, True, False, False]
    assert not Quota(None, -1.0).is_open
    assert Quota(None, 60.0).is_open


@pytest.mark.http
def test_some_requests_under_churn_are_all_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.churn", "--requests=100", "--replace-per-s=5"]
    command += ["--adapters=2", "--versions=2", f"--json={tmp_path / 'churn.json'}"]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "churn.json").read_text())
    assert report["requests"] >= 100
    assert report["replacements"] > 0
    assert report["wrong_answers"] == 0
