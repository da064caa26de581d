"""A cluster on one machine beside others: where its proxy keeps what it needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.cluster import local
from server.cluster.local import ending_with_parent, places_of_proxy, prepare_environment
from server.edge.litserve import logs
from server.edge.processes.failed_start import StartFailed
from server.settings import load_settings

PREFIX = "RAY_SERVE_HAPROXY_"
PORTS = (f"{PREFIX}METRICS_PORT", f"{PREFIX}STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
NODE_ID_CHARACTERS = 56  # of a folder that Ray Serve makes for each node
SOCKET_PATH_MAX = 107  # on Linux; HAProxy binds its own under this name and ".PID.tmp"


NAMES = (
    *PORTS,
    f"{PREFIX}BINARY_PATH",
    *(f"{PREFIX}{one}" for one in ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH")),
    *(f"{PREFIX}{one}" for one in ("SERVER_STATE_BASE", "SERVER_STATE_FILE")),
)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)


def test_a_proxy_has_ports_of_its_own_and_a_folder_for_as_long_as_it_runs() -> None:
    with places_of_proxy():
        assert len({os.environ[name] for name in PORTS}) == len(PORTS)
        folder = Path(os.environ[f"{PREFIX}SERVER_STATE_BASE"])
        assert folder.stat().st_mode & 0o077 == 0  # whoever may write there rules the proxy
        for name in ("SOCKET_PATH", "METRICS_SOCKET_PATH"):
            path = Path(os.environ[PREFIX + name])
            assert path.parent == folder
            assert len(f"{path}/.4194304.tmp") + NODE_ID_CHARACTERS <= SOCKET_PATH_MAX
    assert not folder.exists()
    assert not set(NAMES) & os.environ.keys()


def test_places_that_an_operator_chose_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}STATS_PORT", "8404")
    with places_of_proxy():
        assert os.environ[f"{PREFIX}STATS_PORT"] == "8404"
        assert os.environ[f"{PREFIX}METRICS_PORT"] != "8404"


def test_a_folder_from_which_nothing_may_be_run_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "own_haproxy", lambda: sys.executable)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as of one that is mounted noexec
    with pytest.raises(StartFailed) as caught, places_of_proxy():
        pass
    assert "noexec" in (caught.value.found or "")
    assert "TMPDIR" in (caught.value.fix or "")
    monkeypatch.setenv(f"{PREFIX}BINARY_PATH", sys.executable)
    with places_of_proxy():
        assert os.environ[f"{PREFIX}BINARY_PATH"] == sys.executable


def test_a_folder_too_deep_for_sockets_of_the_proxy_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(StartFailed) as caught, places_of_proxy():
        pass
    assert caught.value.expected == f"at most {SOCKET_PATH_MAX} bytes"
    assert "TMPDIR" in (caught.value.fix or "")
    assert not list(deep.iterdir())


@pytest.mark.parametrize(
    ("longest", "given"),
    [("max_timeout_s", {"max_timeout_s": 3000}), ("drain_s", {"drain_s": 3000})],
)
def test_a_proxy_that_was_replaced_outlives_every_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, longest: str, given: dict[str, Any]
) -> None:
    name = f"{PREFIX}HARD_STOP_AFTER_S"
    monkeypatch.setattr(os, "environ", {})
    settings = load_settings({"data_dir": str(tmp_path), **given})
    prepare_environment(settings)
    assert int(os.environ[name]) > getattr(settings, longest)
    os.environ[name] = "7"
    prepare_environment(settings)
    assert os.environ[name] == "7"


KEEPER = """
import subprocess, sys
program = "import time; print('runs', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.argv[1], "-c", program])
print(child.pid, flush=True)
child.wait()
"""


def test_a_proxy_ends_with_the_process_that_keeps_it(tmp_path: Path) -> None:
    script = tmp_path / "program"
    script.write_text(ending_with_parent(sys.executable))
    script.chmod(0o700)
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(script)], stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    said = {keeper.stdout.readline().strip(), keeper.stdout.readline().strip()}
    (pid,) = (int(one) for one in said - {b"runs"})
    program = psutil.Process(pid)
    try:
        keeper.kill()
        keeper.wait()
        gone, _ = psutil.wait_procs([program], timeout=60)
        assert gone
    finally:
        keeper.stdout.close()
        if program.is_running():
            program.kill()


def test_a_cluster_starts_a_ray_of_its_own_beside_any_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")
    from server.cluster.application import ClusterOptions

    class Started(Exception):
        pass

    asked: dict[str, Any] = {}
    served: Any = None

    def init(**given: Any) -> None:
        asked.update(given)
        raise Started

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # as programs on a real cluster have it
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    monkeypatch.setattr(os, "umask", lambda _: 0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = load_settings({"data_dir": str(tmp_path / "data"), "port": str(port)})
    with pytest.raises(Started):
        local.run_here(settings, ClusterOptions(), say=print, application=lambda *_: served)
    assert asked["address"] == "local"
