"""The run folder: nobody else's is touched, what killed servers left goes, a lost one is remade."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.edge.processes import run_folder as module
from server.edge.processes.failed_start import StartFailed
from server.edge.processes.run_folder import OWNER_LOCK_FILE, RUN_DIR_PREFIX, run_folder
from server.edge.processes.serve import check_socket_folder
from tests.stand.live import END_S, Live, hira, of_one_machine
from tests.stand.waits import until


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(module, "MEMORY_DIR", folder)
    return folder


def test_folder_is_in_memory_and_goes_with_its_server(tmp_path: Path, memory: Path) -> None:
    with run_folder(tmp_path / "run", 0):
        assert (tmp_path / "run").resolve().parent == memory
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        (tmp_path / "run" / "state").write_text("x")
    assert not (tmp_path / "run").is_symlink()
    assert list(memory.iterdir()) == []


def test_copy_of_a_data_folder_leaves_the_first_servers_state_alone(
    tmp_path: Path, memory: Path
) -> None:
    with run_folder(tmp_path / "run", 0):
        (tmp_path / "run" / "state").write_text("the first")
        copy = tmp_path / "copy-of-run"
        copy.symlink_to((tmp_path / "run").readlink())
        with run_folder(copy, 0):
            assert not (copy / "state").exists()
        assert (tmp_path / "run" / "state").read_text() == "the first"


def test_target_of_an_operators_own_link_stays(tmp_path: Path, memory: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "run").symlink_to(precious)
    with run_folder(tmp_path / "run", 0):
        assert not (tmp_path / "run" / "file").exists()
    assert (precious / "file").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from server.edge.processes import run_folder
run_folder.MEMORY_DIR = Path(sys.argv[1])
with run_folder.run_folder(Path(sys.argv[2]), 0):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_left_is_deleted_and_what_is_no_servers_is_not(
    tmp_path: Path, memory: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(memory), str(tmp_path / "other")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = memory.iterdir()
    strange = memory / f"{RUN_DIR_PREFIX}without-a-lock"
    strange.mkdir()
    link = memory / f"{RUN_DIR_PREFIX}link"
    link.symlink_to(tmp_path)
    (tmp_path / OWNER_LOCK_FILE).touch()
    with run_folder(tmp_path / "run", 0):
        assert not left.exists()
        assert strange.exists()
        assert link.is_symlink()
        assert tmp_path.exists()


def test_folder_is_on_the_disk_where_memory_has_no_room(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = SimpleNamespace(f_bavail=64, f_frsize=1_000_000)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    with run_folder(tmp_path / "run", 64_000_000):
        assert (tmp_path / "run").is_symlink()
    assert caplog.text == ""
    with run_folder(tmp_path / "run", 64_000_001):
        assert not (tmp_path / "run").is_symlink()
        assert (tmp_path / "run").is_dir()
        assert list(memory.iterdir()) == []
    assert "64 MB free and the metrics may take 65 MB" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_that_is_gone_is_made_anew_once(
    tmp_path: Path, memory: Path, in_memory: bool
) -> None:
    place = tmp_path / "run"
    if not in_memory:
        memory.rmdir()
    with run_folder(place, 0) as folder:
        assert folder.restore() is False
        shutil.rmtree(place.resolve())
        assert folder.restore() is True
        (place / "state").touch()
        assert folder.restore() is False
        # A folder of somebody else at the same path is not taken for it.
        there = place.resolve()
        there.rename(tmp_path / "aside")
        there.mkdir()
        (there / OWNER_LOCK_FILE).touch()
        assert folder.restore() is True


def predict(live: Live) -> int:
    return live.client.post("/predict?adapter=hira-sst2", json={"inputs": "fine"}).status_code


def counted(live: Live) -> float:
    labels = 'adapter="hira-sst2",endpoint="/predict",status="200"'
    return live.metric(f"hira_requests_total{{{labels}}}")


@of_one_machine("its main process makes the folder anew")
@pytest.mark.http
def test_server_whose_run_folder_is_cleared_serves_on_and_survives_its_workers_death(
    tmp_path: Path,
) -> None:
    with hira(tmp_path / "data") as live:
        pid, place = live.worker_pid, live.folder / "run"
        shutil.rmtree(place.resolve())
        until((place / "worker-0.json").exists)
        until(lambda: live.client.get("/health/ready").status_code == 200)
        assert live.worker_pid == pid, "a worker that lives is not replaced"
        until(lambda: predict(live) == 200 and counted(live) > 0)
        shutil.rmtree(place.resolve())
        os.kill(pid, signal.SIGKILL)
        until(lambda: (place / "worker-0.json").exists() and live.worker_pid != pid)
        live.wait_ready()
        assert predict(live) == 200
        assert live.client.get("/metrics").status_code == 200
        shutil.rmtree(place.resolve())
        live.child.terminate()
        assert live.child.wait(END_S) == 0


def test_a_folder_too_deep_for_sockets_ends_the_start() -> None:
    check_socket_folder("/tmp/pymp-abcdefgh")
    deep = "/tmp/" + "x" * 80 + "/pymp-abcdefgh"
    with pytest.raises(StartFailed, match=r"x, has too long a path .* set TMPDIR"):
        check_socket_folder(deep)
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as one:
        one.bind(f"{deep}/listener-1-0-abcdefgh")
