"""The dependency audit fails for what nobody has looked at, and for nothing else."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FIXED = {"id": "PYSEC-1", "fix_versions": ["1.1"]}
SOUND = {"name": "b", "version": "2.0", "vulns": []}


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = json.loads(module.KNOWN.read_text())
    monkeypatch.setattr(module, "KNOWN", tmp_path / "audit.json")
    module.KNOWN.write_text(json.dumps(known))
    monkeypatch.setattr(module.sys, "argv", ["audit.py"])
    return module


def answering(monkeypatch: pytest.MonkeyPatch, audit: ModuleType, *vulns: dict[str, Any]) -> None:
    report = {"dependencies": [{"name": "a", "version": "1.0", "vulns": list(vulns)}, SOUND]}
    monkeypatch.setattr(audit, "ask", lambda: (report, ""))


def test_new_advisory_fails_until_it_is_recorded(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, audit, FIXED)
    assert audit.main() == 1
    assert "PYSEC-1: a 1.0, fixed in 1.1" in capsys.readouterr().out
    monkeypatch.setattr(audit.sys, "argv", ["audit.py", "--record"])
    audit.main()
    monkeypatch.setattr(audit.sys, "argv", ["audit.py"])
    assert audit.main() == 0


def test_sound_pins_pass(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, audit)
    assert audit.main() == 0


def test_service_out_of_reach_is_said_and_fails_nothing(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ask", lambda: (None, "no network"))
    assert audit.main() == 0
    said = capsys.readouterr().out
    assert "NOT REACHED (no network)" in said
    assert "last known state, of 20" in said


def test_what_is_recorded_is_of_the_versions_that_are_pinned(audit: ModuleType) -> None:
    known = json.loads((ROOT / ".ci" / "audit.json").read_text())
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()
    assert known["constraints_sha256"] == digest, "run: .venv/bin/python .ci/audit.py --record"


def test_versions_that_nobody_could_ask_about_are_recorded_as_not_audited(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(audit, "ask", lambda: (None, "no network"))
    monkeypatch.setattr(audit.sys, "argv", ["audit.py", "--record"])
    before = audit.KNOWN.read_text()
    audit.main()
    assert audit.KNOWN.read_text() == before, "the same versions: what is known of them stays"
    monkeypatch.setattr(audit, "PINS", tmp_path / "constraints.txt")
    audit.PINS.write_text("a==1.0\n")
    audit.main()
    known = json.loads(audit.KNOWN.read_text())
    assert known["constraints_sha256"] == hashlib.sha256(b"a==1.0\n").hexdigest()
    assert known["state"] == "not audited: no network"


def test_report_that_knows_no_package_is_not_taken_for_a_sound_one(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ran:
        stdout = json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}]})
        stderr = ""

    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: Ran())
    assert audit.ask()[0] is None
