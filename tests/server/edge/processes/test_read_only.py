"""The server on a read-only file system: only the data folder and temporary files can be written.

As a container runs it with ``--read-only --tmpfs /tmp``; here by a mount namespace of its own.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from server.demo import ADAPTERS_DIR
from tests.stand.live import of_one_machine, running

pytestmark = [pytest.mark.http, of_one_machine("Ray writes a folder of its own")]

SCRIPT = """
set -e
mount --make-rprivate /
mount --bind "$HIRA_DATA_DIR" "$HIRA_DATA_DIR"
mount -t tmpfs tmpfs "$TMPDIR"
while read -r _ at type _; do
  case "$at" in "$HIRA_DATA_DIR"|"$TMPDIR"|/dev|/dev/*|/proc|/proc/*|/sys|/sys/*) continue;; esac
  mount -o remount,bind,ro "$at" 2>/dev/null || true
done < /proc/mounts
if touch "$HIRA_DATA_DIR.not" 2>/dev/null; then echo "still writable"; exit 9; fi
exec "$@"
"""
SERVE = """
import os, sys
serve = [sys.executable, "-B", "-c", "from server.cli.main import main; main()", "serve"]
os.execvp("unshare", ["unshare", "-m", "sh", "-c", sys.argv[1], "sh", *serve])
"""


def can_unshare() -> bool:
    try:
        found = subprocess.run(
            ["unshare", "-m", "mount", "--make-rprivate", "/"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return found.returncode == 0


def test_nothing_is_written_but_data_and_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_unshare():
        pytest.skip("needs the right to make a mount namespace")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    with (
        tempfile.TemporaryDirectory() as scratch,  # sockets lie in it: a short path
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("TMPDIR", scratch)
        check(tmp_path)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("nobody")] == []


def check(tmp_path: Path) -> None:
    with running(tmp_path / "data", ["-c", SERVE, SCRIPT]) as live:
        answer = live.client.post("/predict?adapter=hira-imdb", json={"inputs": "A fine film."})
        assert answer.status_code == 200, live.log.read_text()[-3000:]
        story = {"inputs": "The king", "parameters": {"max_new_tokens": 4}}
        assert live.client.post("/generate?adapter=hira-wiki", json=story).status_code == 200
        folder = ADAPTERS_DIR / "hira-imdb"
        files = [("files", (one.name, one.read_bytes())) for one in folder.glob("*.*")]
        added = live.client.post(
            "/admin/adapters", data={"name": "again"}, files=files, headers=live.admin
        )
        assert added.status_code in {200, 201}
        assert live.client.get("/metrics").status_code == 200
        shared = [one for one in (tmp_path / "data").rglob("*") if one.stat().st_mode & 0o077]
        assert shared == []
        assert live.end() == 0
        log = live.log.read_text()
        assert "Read-only file system" not in log
        assert "Traceback" not in log
