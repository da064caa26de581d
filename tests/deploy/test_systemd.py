"""The unit for one machine."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.settings import Settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "hira-server.service"
ANALYZE = shutil.which("systemd-analyze")
SPARE_S = 10.0


class _Sections(configparser.ConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr  # systemd's names have capitals


def service() -> dict[str, str]:
    parser = _Sections(strict=False, interpolation=None)
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return dict(parser["Service"])


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert ANALYZE is not None
    text = UNIT.read_text(encoding="utf-8")
    # Programs that the unit starts must exist where it is verified.
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("/opt/hira/venv/bin/hira", "/bin/true"))
    done = subprocess.run(
        [ANALYZE, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [one for one in done.stderr.splitlines() if UNIT.name in one]
    assert (done.returncode, said) == (0, []), done.stderr


def test_the_unit_gives_the_server_time_to_drain_and_no_rights() -> None:
    found = service()
    stop = re.fullmatch(r"(\d+)s", found["TimeoutStopSec"])
    assert stop
    assert float(stop[1]) >= Settings.model_fields["drain_s"].default + SPARE_S
    assert found["User"] not in {"", "root", "0"}
    assert found["NoNewPrivileges"] == "true"
    assert found["CapabilityBoundingSet"] == ""
    assert found["ProtectSystem"] == "strict"
    assert found["Restart"] == "on-failure"
    assert "$MAINPID" in found["ExecReload"], "settings are read again on SIGHUP"
